"""A training step plain, with OGPSA, and with the authors' hooks, in turn in one process group.

```
torchrun --nproc-per-node 2 -m megatron_ogpsa.benchmarks.step
```

One GPT of some 30M parameters in Megatron's own data and tensor parallelism, its distributed Adam, random tokens: a step is
``--accumulate`` micro-batches and one ``optimizer.step()``. Steps go plain, projected, hooks, plain, …, with the same
micro-batches, so that ratios within a round do not depend on who else is on the machine. Refreshes are timed by themselves:
their reference passes, and what capturing and orthonormalising adds to them. Memory is the highest that a rank held during
a step, first without references, then with a basis, then with the hooks' copies beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ogpsa.benchmarks.authors_hooks import AuthorsHooks
from megatron_ogpsa.benchmarks.loop import Loop, has_gpu
from megatron_ogpsa.benchmarks.memory import peak_bytes
from megatron_ogpsa.benchmarks.timing import in_turn, median_ratio, versions, wait
from megatron_ogpsa.errors import UserError

if TYPE_CHECKING:
    pass


def refresh_seconds(loop: Loop) -> dict[str, float]:
    """Of a refresh: its reference passes, and what is not passes."""

    def now() -> float:
        wait(loop.device)
        return time.perf_counter()

    passes = 0.0
    start = last = now()
    loop.ogpsa.begin_refresh()
    for name in loop.references():
        passes += now() - last
        loop.ogpsa.capture(name)
        last = now()
    loop.ogpsa.finish_refresh()
    return {"passes": passes, "beside passes": now() - start - passes}


def authors_hooks(loop: Loop) -> AuthorsHooks:
    """The hooks, with references as this rank sees them: whole tensors of its part of the model, in its dtype."""
    captured: list[list[Tensor]] = [[] for _ in loop.parameters]
    for _ in loop.references():
        for own, parameter in zip(captured, loop.parameters, strict=True):
            own.append(parameter.main_grad.detach().to(parameter.dtype, copy=True))
    return AuthorsHooks(loop.parameters, captured)


class CountedCollectives(TorchDispatchMode):
    """Counts collectives where PyTorch dispatches them: Megatron holds some of their Python functions by other names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    @override
    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one layout, on this rank."""
    loop = Loop(args)
    loop.step()  # Adam makes its state
    work: dict[str, Callable[[], object]] = {"plain": loop.step, "ogpsa": loop.projected_step}
    loop.refresh()
    loop.projected_step()  # what compiles the passes takes 100 MB, once
    loop.attach_anew()
    memory = {"plain": peak_bytes(loop.device, loop.step)}
    loop.refresh()
    memory["refresh"] = peak_bytes(loop.device, loop.refresh)
    memory["ogpsa"] = peak_bytes(loop.device, loop.projected_step)
    refreshes = [refresh_seconds(loop) for _ in range(3)]
    authors: dict[str, Any] = {}
    if args.authors:
        hooks = authors_hooks(loop)
        work["authors"] = lambda: _hooked_step(loop, hooks)
        memory["authors"] = peak_bytes(loop.device, work["authors"])
        authors = {"bytes of the authors' copies": hooks.bytes_held}
    collectives = {}
    for name in ("plain", "ogpsa"):
        with CountedCollectives() as counted:
            work[name]()
        collectives[name] = counted.number
    settings = {"rounds": args.rounds, "device": loop.device, "quiet": dist.get_rank() > 0}
    seconds = in_turn(work, title="steps", **settings)
    step_only = in_turn(
        {"plain": loop.optimizer.step, "ogpsa": lambda: _step_alone(loop)},
        title="optimizer steps",
        **settings,
    )
    passes = sum(one["passes"] for one in refreshes)
    beside = sum(one["beside passes"] for one in refreshes)
    return {
        "parameters": sum(parameter.numel() for parameter in loop.parameters),
        "tensors": len(loop.parameters),
        "elements of this rank's shard": loop.ogpsa._shard.layout.num_elements,
        "basis vectors": args.rank,
        "seconds of a plain step": statistics.median(seconds["plain"]),
        **{f"{name} / plain": median_ratio(seconds[name], seconds["plain"]) for name in work if name != "plain"},
        "milliseconds of optimizer.step(), plain": 1e3 * statistics.median(step_only["plain"]),
        "milliseconds of optimizer.step(), ogpsa": 1e3 * statistics.median(step_only["ogpsa"]),
        "milliseconds added to optimizer.step(), quartiles": _added(step_only),
        "collectives of a step, plain": collectives["plain"],
        "collectives of a step, ogpsa": collectives["ogpsa"],
        "bytes of the basis": loop.ogpsa.basis_bytes,
        **authors,
        **{f"peak bytes, {name}": found for name, found in memory.items()},
        "refresh: share beside its passes": beside / (passes + beside),
        "refresh: milliseconds beside its passes": 1e3 * beside / len(refreshes),
        "refresh / plain step": statistics.median(sum(one.values()) for one in refreshes)
        / statistics.median(seconds["plain"]),
    }


def _added(seconds: Mapping[str, Sequence[float]]) -> list[float]:
    """Lower quartile, median and upper quartile, over rounds, of what projection adds within a round."""
    added = [1e3 * (own - plain) for own, plain in zip(seconds["ogpsa"], seconds["plain"], strict=True)]
    return statistics.quantiles(added, n=4, method="inclusive")


def _hooked_step(loop: Loop, hooks: AuthorsHooks) -> None:
    hooks.attach()
    loop.step()
    hooks.detach()


def _step_alone(loop: Loop) -> None:
    loop.ogpsa.enabled = True
    loop.optimizer.step()
    loop.ogpsa.enabled = False


def main(argv: list[str] | None = None) -> int:
    """Be a rank of torchrun; rank 0 prints, and writes JSON where it is asked to."""
    args = parser().parse_args(argv)
    if "RANK" not in os.environ:
        sys.exit("start it with torchrun: torchrun --nproc-per-node 2 -m megatron_ogpsa.benchmarks.step")
    try:
        check(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    backend = "nccl" if has_gpu() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    figures = measure(args)
    if dist.get_rank() == 0:
        layout = {"world size": dist.get_world_size(), "tensor parallel": args.tensor_model_parallel_size}
        machine: dict[str, Any] = {
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load average": os.getloadavg()[1],
        }
        if has_gpu():
            machine |= {"device": torch.cuda.get_device_name(), "versions": versions()}
        figures = layout | machine | {"date": time.strftime("%Y-%m-%d")} | figures
        for name, value in figures.items():
            print(f"{name:45} {value:.4g}" if isinstance(value, float) else f"{name:45} {value}")
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**figures, "arguments": {k: str(v) for k, v in vars(args).items()}}) + "\n")
    dist.destroy_process_group()
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured here.

    Raises:
        UserError: layers of a Transformer Engine that is not there.
    """
    if args.transformer_impl == "transformer_engine" and find_spec("transformer_engine") is None:
        raise UserError(
            "--transformer-impl transformer_engine: it is not installed: use local, or install it (docs/fp8.md)"
        )


def parser(prog: str = "torchrun -m megatron_ogpsa.benchmarks.step") -> argparse.ArgumentParser:
    """The command's flags."""
    made = argparse.ArgumentParser(prog=prog)
    for name, default in (
        ("tensor-model-parallel-size", 1),
        ("num-layers", 8),
        ("hidden-size", 512),
        ("vocabulary", 8192),
        ("seq-length", 64),
        ("micro-batch-size", 4),
        ("accumulate", 4),
        ("rank", 2),
        ("rounds", 7),
    ):
        made.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    made.add_argument("--granularity", choices=("tensor", "model"), default="tensor")
    made.add_argument("--space", choices=("gradient", "update"), default="gradient")
    made.add_argument("--mode", choices=("orthogonal", "conflict"), default="orthogonal")
    made.add_argument("--basis-dtype", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--basis-device", choices=("accelerator", "cpu"), default="accelerator")
    made.add_argument("--bf16", action="store_true", help="weights and products; gradients are summed in fp32")
    made.add_argument(
        "--transformer-impl",
        choices=("local", "transformer_engine"),
        default="local",
        help="whose layers: Megatron's own (the default) or Transformer Engine's",
    )
    made.add_argument(
        "--authors", action=argparse.BooleanOptionalAction, default=True, help="compare with the authors' hooks too"
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="append a line of JSON")
    return made


if __name__ == "__main__":
    sys.exit(main())
