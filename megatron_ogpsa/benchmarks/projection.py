"""The projection's two passes beside a triad of the same machine: ``python -m megatron_ogpsa.benchmarks.projection``.

| pass | reads | writes | bytes of an element |
|---|---|---|---|
| dots: c = Qᵀg and ‖g‖² | g, K rows of Q | | 4 + K·b |
| subtract: g ← g − Q·r | g, K rows of Q | g | 8 + K·b |
| triad: a = b + s·c | b, c | a | 12 |
| copy: a = b | b | a | 8 |

b is 4 with an fp32 basis and 2 with bf16. A ratio compares GB/s within one round. What it took before loops were compiled,
``subtract_combination`` and ``gram_and_dots`` in PyTorch, is timed with ``--with-pytorch``; the passes over many vectors,
as weights are whose changes are projected, with ``--with-apart``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from megatron_ogpsa.benchmarks.timing import in_turn, median_ratio
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.projection import passes
from megatron_ogpsa.projection.segments import Segment, SegmentLayout, gram_and_dots, subtract_combination

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRIAD_BYTES, COPY_BYTES = 12, 8
REPEAT_ON_GPU = 20
PADDING = 64
"""Elements (``pad_param_start`` in megatron/core/optimizer/param_layout.py)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    elements: int
    rank: int
    blocks: int
    basis_dtype: str


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of one pass.

    Attributes:
        gigabytes_per_second: median.
        of_triad, of_copy: of the bandwidth of a triad, and of a copy; medians of ratios within a round.
        milliseconds: median.
        times: those of the same pass, compiled and over one vector; the median of ratios within a round.
        device_milliseconds: what the device worked for it, by its own clock; None if that was not asked for.
    """

    gigabytes_per_second: float
    of_triad: float
    of_copy: float
    milliseconds: float
    times: float
    device_milliseconds: float | None = None


def blocks_of(elements: int, number: int) -> list[Segment]:
    """``elements`` in ``number`` runs of unequal lengths, as tensors are: a third of them a hundredth of the others.

    Each begins at a multiple of :data:`PADDING`, as in the buffers of Megatron's distributed optimizer.
    """
    shares = [1 if index % 3 == 2 else 100 for index in range(number)]
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + share)
    cuts = [*(elements * bound // bounds[-1] // PADDING * PADDING for bound in bounds[:-1]), elements]
    return [Segment(stop - start, block, True) for block, (start, stop) in enumerate(pairwise(cuts))]


def measure(
    case: Case,
    device: torch.device,
    *,
    rounds: int,
    with_pytorch: bool,
    with_apart: bool = False,
    by_device: bool = False,
) -> dict[str, Speed]:
    """Speeds of the passes over one shard, by name; ``triad`` and ``copy`` are among them.

    Args:
        with_apart: also those over a vector for each block, as weights are whose changes are projected; otherwise all
            blocks lie in one, as gradients do in Megatron's buffer.
        by_device: ask the device's own clock too.
    """
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.basis_dtype]
    vector, a, b, c = (torch.randn(case.elements, generator=generator, device=device) for _ in range(4))
    rows = torch.empty(case.rank, case.elements, dtype=dtype, device=device)
    for row in rows:
        row.copy_(torch.randn(case.elements, generator=generator, device=device).div_(case.elements**0.5))
    num_blocks, segments = case.blocks, blocks_of(case.elements, case.blocks)
    layout = SegmentLayout([segments], num_blocks, device)
    weights = torch.full((num_blocks, case.rank), 1e-6, dtype=torch.float64, device=device)
    work = {
        "triad": lambda: torch.add(b, c, alpha=2.0, out=a),
        "copy": lambda: a.copy_(b),
        "dots": lambda: passes.dots(layout, rows, [vector]),
        "subtract": lambda: passes.subtract(layout, [vector], rows, weights),
    }
    if with_pytorch:
        work |= {
            "dots in PyTorch": lambda: gram_and_dots(layout, rows, [vector]),
            "subtract in PyTorch": lambda: subtract_combination(layout, [vector], rows, weights),
        }
    if with_apart:
        layout_apart = SegmentLayout([[one] for one in segments], num_blocks, device)
        vectors = [part.clone() for part in vector.split(layout_apart.span_lengths)]
        work |= {
            "dots apart": lambda: passes.dots(layout_apart, rows, vectors),
            "subtract apart": lambda: passes.subtract(layout_apart, vectors, rows, weights),
        }
    repeat = REPEAT_ON_GPU if device.type == "cuda" else 1
    seconds = in_turn(work, rounds=rounds, device=device, title=f"{case.elements:.0e}, K={case.rank}", repeat=repeat)
    on_device = {name: _device_milliseconds(function) if by_device else None for name, function in work.items()}
    return {name: _speed(name, case, rows, seconds, on_device[name]) for name in work}


def _device_milliseconds(work: Callable[[], object]) -> float:
    from megatron_ogpsa.benchmarks.profile import busy_milliseconds, recorded

    return busy_milliseconds(recorded(work, REPEAT_ON_GPU), REPEAT_ON_GPU)


def _speed(name: str, case: Case, rows: Tensor, seconds: dict[str, list[float]], on_device: float | None) -> Speed:
    of_basis = case.rank * rows.element_size()
    bytes_of = {"triad": TRIAD_BYTES, "copy": COPY_BYTES, "dots": 4 + of_basis, "subtract": 8 + of_basis}
    usual = name.split()[0]
    own = bytes_of[usual]

    def of(other: str) -> float:
        return own / bytes_of[other] * median_ratio(seconds[other], seconds[name])

    median = statistics.median(seconds[name])
    return Speed(
        gigabytes_per_second=own * case.elements / median / 1e9,
        of_triad=of("triad"),
        of_copy=of("copy"),
        milliseconds=1e3 * median,
        times=median_ratio(seconds[name], seconds[usual]),
        device_milliseconds=on_device,
    )


def main(argv: list[str] | None = None) -> int:
    """Measure all combinations that were asked for, print a table, and write them as JSON."""
    args = _parser().parse_args(argv)
    device = with_index(torch.device(args.device))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device_times and device.type != "cuda":
        print(f"error: --device-times: {device} has no clock of its own; leave the flag out", file=sys.stderr)
        return UserError.exit_code
    results = []
    for elements, blocks, dtype, rank in itertools.product(args.elements, args.blocks, args.basis_dtype, args.rank):
        case = Case(elements=int(elements), rank=rank, blocks=blocks, basis_dtype=dtype)
        try:
            speeds = measure(
                case,
                device,
                rounds=args.rounds,
                with_pytorch=args.with_pytorch,
                with_apart=args.with_apart,
                by_device=args.device_times,
            )
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        results.append({**asdict(case), "passes": {name: asdict(speed) for name, speed in speeds.items()}})
        _tell(case, speeds)
    if args.json:
        account = {"device": _described(device), "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}
        account |= {"command": "python -m megatron_ogpsa.benchmarks.projection " + " ".join(argv or sys.argv[1:])}
        versions = {name: version(name) for name in ("torch", "triton" if device.type == "cuda" else "numba")}
        args.json.write_text(json.dumps(account | {"versions": versions, "results": results}, indent=1) + "\n")
    return 0


def with_index(device: torch.device) -> torch.device:
    """The current GPU where none is named: the device that its tensors say they lie on."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.projection")
    parser.add_argument("--elements", type=float, nargs="+", default=[1e7, 1e8], help="of a shard (1e7 1e8)")
    parser.add_argument("--rank", type=int, nargs="+", default=[1, 2, 4, 8], help="basis vectors K (1 2 4 8)")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[1, 300], help="the whole model, or its tensors (1 300)"
    )
    parser.add_argument("--basis-dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="on CPU (torch's default)")
    parser.add_argument("--rounds", type=int, default=9, help="counted repetitions (9)")
    parser.add_argument("--with-pytorch", action="store_true", help="also the passes tile by tile in PyTorch")
    parser.add_argument(
        "--with-apart",
        action="store_true",
        help="also the passes over a vector for each block, as weights are whose changes are projected",
    )
    parser.add_argument(
        "--device-times", action="store_true", help="also what a GPU works for a pass, by PyTorch's profiler"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def _tell(case: Case, speeds: dict[str, Speed]) -> None:
    shown = ", ".join(
        f"{name} {speed.gigabytes_per_second:.1f} GB/s = {speed.of_triad:.0%} of triad, {speed.of_copy:.0%} of copy"
        + (f" ({speed.device_milliseconds:.3f} ms on the device)" if speed.device_milliseconds else "")
        for name, speed in speeds.items()
        if name not in ("triad", "copy")
    )
    triad = speeds["triad"].gigabytes_per_second
    what = f"{case.elements:.0e} elements, K={case.rank}, {case.blocks} blocks, {case.basis_dtype}"
    print(f"{what}: triad {triad:.1f} GB/s; {shown}", flush=True)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    return f"CPU, {names[0] if names else 'unknown'}, {len(names)} cores"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
