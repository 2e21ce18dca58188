"""Where the time of a step on a GPU goes, by PyTorch's profiler: plain, with the basis beside the gradient, and on the host.

```
torchrun --nproc-per-node 1 -m megatron_ogpsa.benchmarks.profile --bf16 --transformer-impl transformer_engine
```

The model and its steps are those of :mod:`megatron_ogpsa.benchmarks.step`. Of each setting a few steps are recorded, as the
trace that PyTorch writes for Perfetto; what the device did is read from that: kernels and copies, each with its stream, its
beginning and its end. :func:`account` adds them up by kind, and tells how much of the copies from the host ran while
something was computed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from megatron_ogpsa.benchmarks import step
from megatron_ogpsa.benchmarks.loop import Loop
from megatron_ogpsa.benchmarks.timing import versions
from megatron_ogpsa.errors import UserError

PLAIN, BESIDE, FP32_ON_HOST, BF16_ON_HOST = (
    "plain",
    "basis beside the gradient",
    "basis on the host",
    "basis on the host, bf16",
)
SETTINGS: Mapping[str, Mapping[str, str] | None] = {
    PLAIN: None,
    BESIDE: {"basis_device": "accelerator", "basis_dtype": "fp32"},
    FP32_ON_HOST: {"basis_device": "cpu", "basis_dtype": "fp32"},
    BF16_ON_HOST: {"basis_device": "cpu", "basis_dtype": "bf16"},
}
"""What a step is taken with, by name; None: no references."""

WARM_UP = 2
"""Steps before those that are recorded."""

PROJECTION, OPTIMIZER, PRODUCTS, OTHER, COPIES = (
    "projection",
    "optimizer",
    "matrix products",
    "other kernels",
    "copies from the host",
)
_KINDS: Mapping[str, tuple[str, ...]] = {
    PROJECTION: ("ogpsa_",),
    OPTIMIZER: ("multi_tensor", "adam", "Adam"),
    PRODUCTS: ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "flash", "fmha", "cudnn"),
}
"""Kind of a kernel → what its name begins with (ours) or holds (others'); the first kind that fits."""

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cudaMemcpy")
"""Calls in which the host waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """What the device did from ``start`` to ``stop``, in milliseconds from the beginning of what was recorded."""

    kind: str
    name: str
    stream: int
    start: float
    stop: float


def kind_of(event: Mapping[str, Any]) -> str:
    """Of an event that the device took part in, by its category and name."""
    name = event["name"]
    if event["cat"] != "kernel":
        return COPIES if "HtoD" in name else OTHER
    if name.startswith(_KINDS[PROJECTION]):
        return PROJECTION
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), OTHER)


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """What the device did, in the order of time.

    Args:
        trace: the JSON that ``torch.profiler`` exports: microseconds; categories ``kernel``, ``gpu_memcpy``, ``gpu_memset``.
    """
    events = [event for event in trace["traceEvents"] if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not events:
        return []
    first = min(event["ts"] for event in events)
    spans = [
        Span(
            kind=kind_of(event),
            name=event["name"],
            stream=event["args"]["stream"],
            start=(event["ts"] - first) / 1e3,
            stop=(event["ts"] + event["dur"] - first) / 1e3,
        )
        for event in events
    ]
    return sorted(spans, key=lambda span: (span.start, span.stop))


def merged(spans: Iterable[Span], *, gap: float = 0.0) -> list[tuple[float, float]]:
    """The times that any of ``spans`` covers, as intervals that are apart by more than ``gap`` milliseconds."""
    intervals: list[tuple[float, float]] = []
    for span in sorted(spans, key=lambda span: span.start):
        if intervals and span.start <= intervals[-1][1] + gap:
            intervals[-1] = (intervals[-1][0], max(intervals[-1][1], span.stop))
        else:
            intervals.append((span.start, span.stop))
    return intervals


def length(intervals: Iterable[tuple[float, float]]) -> float:
    """In milliseconds."""
    return sum(stop - start for start, stop in intervals)


def common(one: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """Milliseconds that lie in both of two sequences, each in order and without overlap of its own."""
    shared, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        shared += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return shared


def account(trace: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Figures of one step, the mean over ``steps`` that were recorded.

    Raises:
        UserError: nothing was recorded on a device.
    """
    spans = _spans_or_told(trace)
    by_kind = {kind: merged(span for span in spans if span.kind == kind) for kind in (*_KINDS, OTHER, COPIES)}
    computed = merged(span for span in spans if span.kind != COPIES)
    busy = merged(spans)
    copies = by_kind[COPIES]
    waits = [event for event in trace["traceEvents"] if event.get("cat") == "cuda_runtime" and event["name"] in WAITS]
    return {
        "milliseconds": (busy[-1][1] - busy[0][0]) / steps,
        **{f"milliseconds of {kind}": length(intervals) / steps for kind, intervals in by_kind.items()},
        "milliseconds of copies beside kernels": common(copies, computed) / steps,
        "milliseconds idle": (busy[-1][1] - busy[0][0] - length(busy)) / steps,
        "kernels": sum(span.kind != COPIES for span in spans) / steps,
        "kernels of the projection": sum(span.kind == PROJECTION for span in spans) / steps,
        "waits of the host": len(waits) / steps,
    }


def timeline(trace: Mapping[str, Any], steps: int) -> dict[str, list[list[float]]]:
    """Kind → [start, stop] in milliseconds, of the last of ``steps``, from when its first kernel could begin."""
    spans = spans_of(trace)
    whole = max(span.stop for span in spans)
    begin = whole - whole / steps
    return {
        kind: [
            [round(max(start - begin, 0.0), 3), round(stop - begin, 3)]
            for start, stop in merged((span for span in spans if span.kind == kind), gap=whole / steps / 1000)
            if stop > begin
        ]
        for kind in (*_KINDS, OTHER, COPIES)
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Setting → its account and timeline."""
    found = {}
    for name, own in SETTINGS.items():
        trace = _trace(argparse.Namespace(**{**vars(args), **(own or {})}), name, projected=own is not None)
        found[name] = account(trace, args.steps) | {"timeline": timeline(trace, args.steps)}
        gc.collect()  # the model, which its own methods hold on to
        torch.cuda.empty_cache()
    return found


def _trace(args: argparse.Namespace, name: str, *, projected: bool) -> dict[str, Any]:
    """What the profiler says of ``args.steps`` steps of a new model."""
    loop = Loop(args)
    if projected:
        loop.refresh()
    work = loop.projected_step if projected else loop.step
    for _ in range(WARM_UP):
        work()
    file = args.trace / f"{name.replace(', ', '-').replace(' ', '-')}.json" if args.trace else None
    trace = recorded(work, args.steps, file)
    loop.close()
    return trace


def recorded(work: Callable[[], object], times: int, file: Path | None = None) -> dict[str, Any]:
    """The trace of doing ``work`` so many times, as PyTorch exports it; kept in ``file`` if there is one."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(times):
            work()
        torch.cuda.synchronize()
    with TemporaryDirectory() as scratch:
        file = file or Path(scratch) / "trace.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(file))
        trace: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return trace


def busy_milliseconds(trace: Mapping[str, Any], times: int) -> float:
    """In which the device did something, of one of so many times, however long the host took to launch it.

    Raises:
        UserError: nothing was recorded on a device.
    """
    return length(merged(_spans_or_told(trace))) / times


def _spans_or_told(trace: Mapping[str, Any]) -> list[Span]:
    if not (spans := spans_of(trace)):
        raise UserError("the profiler recorded nothing on a GPU: CUPTI may be held by another profiler; end that one")
    return spans


def _parser() -> argparse.ArgumentParser:
    made = step.parser("torchrun -m megatron_ogpsa.benchmarks.profile")
    made.add_argument("--steps", type=int, default=3, help="recorded of each setting (3)")
    made.add_argument("--trace", type=Path, metavar="FOLDER", help="keep the traces, for Perfetto")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Be the one rank of torchrun: measure, print, and write JSON where it is asked to."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    args = _parser().parse_args(given)
    try:
        if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") != "1":
            raise UserError(
                "it profiles one rank: start it with torchrun --nproc-per-node 1 -m megatron_ogpsa.benchmarks.profile"
            )
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: use 1 or more")
        step.check(args)
        if not torch.cuda.is_available():
            raise UserError("no GPU: torch.cuda.is_available() is False, and a CPU has nothing that copies run beside")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        found = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, figures in found.items():
        print(name)
        for what, value in figures.items():
            if isinstance(value, float):
                print(f"  {what:42} {value:.4g}")
    if args.json:
        told = {
            "command": "torchrun --nproc-per-node 1 -m megatron_ogpsa.benchmarks.profile " + " ".join(given),
            "date": time.strftime("%Y-%m-%d"),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "steps": args.steps,
            "settings": found,
        }
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
