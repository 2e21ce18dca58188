"""Every rank of a cluster that is not there: what it holds, and that each element of the model counts exactly once.

``python -m tests.planning.every_rank`` does it for the two clusters of 1,024 ranks and prints what it found; a test does
it for small ones. Ranks are independent of each other, so that processes share them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import Any

from tqdm import tqdm

from tests.core import oracle
from tests.planning.worlds import THOUSAND, WORLDS, World

Interval = tuple[int, int]


def simulated(world: World, ranks: Sequence[int]) -> list[Any]:
    """The given ranks of a cluster, built in this process, which cannot train afterwards."""
    _prepare()
    from megatron_ogpsa.planning.arguments import cluster_arguments
    from megatron_ogpsa.planning.simulation import simulate

    args = cluster_arguments(world.as_flags(), world.size)
    return [simulate(args, rank) for rank in ranks]


@cache
def _prepare() -> None:
    from megatron_ogpsa.integration.runtime.cpu import install_on_meta

    install_on_meta()
    from megatron.core.parallel_state import RankGenerator

    # The lists of ranks are the same for each rank, and take most of the time of 1,024.
    RankGenerator.get_ranks = _remembered(RankGenerator.get_ranks)  # type: ignore[method-assign]


def _remembered(get_ranks: Any) -> Any:
    known: dict[tuple[Any, ...], Any] = {}

    def get(self: Any, *args: Any, **kwargs: Any) -> Any:
        key = (self.order, *self.ordered_size, *args, *sorted(kwargs.items()))
        if key not in known:
            known[key] = get_ranks(self, *args, **kwargs)
        return known[key]

    return get


@contextmanager
def processes(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that build ranks; each imports Megatron once, for all clusters."""
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def all_ranks(world: World, pool: ProcessPoolExecutor, parts: int) -> list[Any]:
    """All ranks of a cluster, shared out to processes in so many parts."""
    shares = [range(world.size)[start::parts] for start in range(parts)]
    found = pool.map(simulated, [world] * parts, shares)
    done = tqdm(found, total=parts, desc="simulating", unit=" parts", delay=5.0, leave=False)
    return sorted((rank for share in done for rank in share), key=lambda rank: rank.rank)


def faults(ranks: Iterable[Any], shape: oracle.ModelShape) -> Iterator[str]:
    """What is wrong in the ownership of a whole cluster; nothing if each element counts once in each group that sums.

    Intervals are of shares of parameters as Megatron holds them; block sizes are those of the Hugging Face tensors.
    """
    from tests.core.cases import hf_name

    covered: dict[tuple[int, str, int], list[Interval]] = defaultdict(list)
    numel: dict[tuple[str, int], int] = {}
    elements: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for rank in ranks:
        group = rank.reduction_ranks[0]
        for piece in rank.pieces:
            numel[piece.name, piece.share] = piece.numel
            if piece.counted:
                covered[group, piece.name, piece.share].append((piece.start, piece.stop))
                for block, length in piece.runs:
                    elements[group][block] += length
    for group in elements:
        for (name, share), length in numel.items():
            if gap := first_fault(covered[group, name, share], length):
                yield f"{name}, share {share}, in the group of rank {group}: {gap}"
        expected = _expected(shape)
        actual = {hf_name(block, latent=shape.latent): count for block, count in elements[group].items()}
        for name in sorted(expected.keys() | actual.keys()):
            if expected.get(name) != actual.get(name):
                yield f"{name} in the group of rank {group}: {actual.get(name)} elements, not {expected.get(name)}"


@cache
def _expected(shape: oracle.ModelShape) -> dict[str, int]:
    """Elements of each Hugging Face tensor."""
    sizes = {}
    for name, size in oracle.shapes_of(shape).items():
        product = 1
        for length in size:
            product *= length
        sizes[name] = product
    return sizes


def first_fault(intervals: list[Interval], length: int) -> str | None:
    """The first element of [0, length) that no interval covers, or that two do."""
    position = 0
    for start, stop in sorted(intervals):
        if start == stop:
            continue
        if start != position:
            return f"element {min(start, position)} counts {'twice' if start < position else 'never'}"
        position = stop
    return None if position == length else f"element {min(position, length)} counts never"


def summary(ranks: Sequence[Any]) -> dict[str, Any]:
    """What a cluster's ranks hold, in figures."""
    groups = {rank.reduction_ranks for rank in ranks}
    shards = [rank.size.elements for rank in ranks]
    return {
        "ranks": len(ranks),
        "groups_that_sum": len(groups),
        "ranks_of_each": len(next(iter(groups))),
        "pieces": sum(len(rank.pieces) for rank in ranks),
        "counted_elements": sum(p.stop - p.start for r in ranks for p in r.pieces if p.counted),
        "held_elements": sum(shards),
        "shard_elements": [min(shards), max(shards)],
        "basis_bytes_for_each_reference": [4 * min(shards), 4 * max(shards)],
    }


def main() -> int:
    """Check clusters by name and print the figures; 1 if an element does not count once."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("worlds", nargs="*", default=list(THOUSAND), metavar="WORLD", help=", ".join(WORLDS | THOUSAND))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    found, is_wrong = {}, False
    with processes(args.processes) as pool:
        for name in args.worlds:
            started, world = time.monotonic(), (WORLDS | THOUSAND)[name]
            ranks = all_ranks(world, pool, parts=4 * args.processes)
            wrong = list(faults(ranks, world.shape))
            is_wrong = is_wrong or bool(wrong)
            found[name] = summary(ranks) | {"faults": wrong[:10], "seconds": round(time.monotonic() - started, 1)}
    about = {
        "command": f"python -m tests.planning.every_rank {' '.join(args.worlds)}",
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
        "processes": args.processes,
    }
    print(json.dumps(about | {"worlds": found}, indent=2))
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
