"""What a rank of a large cluster sends: collectives of a plain step, a projected one and a refresh, by name and bytes.

The rank is real, the others are not: on torch's fake process group collectives return at once. Run as
``python -m tests.planning.collectives WORLD RANK ...``; prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.planning.worlds import THOUSAND, WORLDS, World

Calls = Counter[tuple[str, int]]
NAMES = (
    *("all_reduce", "all_gather_into_tensor", "_all_gather_base", "broadcast", "all_gather_object", "barrier"),
    *("reduce_scatter_tensor", "_reduce_scatter_base", "all_gather", "reduce", "all_to_all_single"),
)
REFERENCES = 2


@contextmanager
def recorded_collectives() -> Iterator[Calls]:
    """Count calls of torch.distributed's collectives by name and bytes of their first tensor."""
    calls: Calls = Counter()

    def recording(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[0] if args else kwargs.get("tensor")
            calls[name, tensor.nbytes if isinstance(tensor, torch.Tensor) else 0] += 1
            return original(*args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: recording(name, getattr(dist, name)) for name in NAMES}):
        yield calls


def collectives(world: World, rank: int, space: str) -> dict[str, Any]:
    """Of one rank; the blocks are its own, since no other rank tells it of more."""
    from megatron_ogpsa import OGPSAConfig, attach
    from megatron_ogpsa.integration.runtime.cpu import CPU
    from megatron_ogpsa.integration.runtime.fake_world import build_chunks, build_optimizer, fake_world
    from megatron_ogpsa.planning.arguments import cluster_arguments

    args = cluster_arguments(world.as_flags(), world.size)
    with fake_world(args, rank):
        chunks = build_chunks(args, CPU)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data.zero_()  # memory as it was found may hold NaN, and such a step is skipped
        optimizer = build_optimizer(args, chunks)

        def fill(seed: int) -> None:
            torch.manual_seed(seed)
            for chunk in chunks:
                for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
                    buffer.grad_data.normal_()
            optimizer.zero_grad()

        def step() -> Calls:
            fill(seed=0)
            with recorded_collectives() as calls:
                optimizer.step()
            return calls

        def refresh(ogpsa: Any) -> Calls:
            ogpsa.begin_refresh()
            for number in range(REFERENCES):
                fill(seed=number + 1)
                ogpsa.capture(f"reference {number}")
            with recorded_collectives() as calls:
                ogpsa.finish_refresh()
            return calls

        step()  # Megatron caches answers about parameter groups in its first step
        plain = step()
        ogpsa = attach(optimizer, chunks, OGPSAConfig(space=space))  # type: ignore[arg-type]
        refreshes = [refresh(ogpsa) for _ in range(2)]
        projected = step()
        return {
            "blocks": len(ogpsa.block_names),
            "plain": _as_list(plain),
            "projected": _as_list(projected),
            "refreshes": [_as_list(calls) for calls in refreshes],
        }


def _as_list(calls: Calls) -> list[Any]:
    return sorted([name, size, count] for (name, size), count in calls.items())


def main() -> None:
    """Each rank that is named, in both spaces."""
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    name, *ranks = sys.argv[1:]
    world = (WORLDS | THOUSAND)[name]
    print(json.dumps({s: {rank: collectives(world, int(rank), s) for rank in ranks} for s in ("gradient", "update")}))


if __name__ == "__main__":
    main()
