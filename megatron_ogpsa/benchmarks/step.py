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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ogpsa.benchmarks.authors_hooks import AuthorsHooks
from megatron_ogpsa.benchmarks.memory import peak_bytes
from megatron_ogpsa.benchmarks.timing import in_turn, median_ratio, wait
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

if TYPE_CHECKING:
    from megatron_ogpsa import OGPSA


class Loop:
    """A megatron-core loop over one model, with everything that is compared at hand.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(args.tensor_model_parallel_size)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        self._args = args
        self.device = torch.device("cuda", torch.cuda.current_device()) if _has_gpu() else torch.device("cpu")
        self.chunk, self.optimizer = _model_and_optimizer(args)
        self.parameters = [parameter for parameter in self.chunk.parameters() if parameter.requires_grad]
        generator = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
        shape = (args.accumulate, args.micro_batch_size, args.seq_length + 1)
        self._tokens = torch.randint(0, args.vocabulary, shape, generator=generator).to(self.device)
        self.ogpsa = self._attached()

    def _attached(self) -> OGPSA:
        from megatron_ogpsa import OGPSAConfig, attach

        args = self._args
        config = OGPSAConfig(
            granularity=args.granularity,
            space=args.space,
            mode=args.mode,
            basis_dtype=args.basis_dtype,
            basis_device=args.basis_device,
        )
        ogpsa = attach(self.optimizer, self.chunk, config)
        ogpsa.enabled = False
        return ogpsa

    def attach_anew(self) -> None:
        """Leave no basis."""
        self.ogpsa.detach()
        self.ogpsa = self._attached()

    def close(self) -> None:
        """Let another loop be made in this process."""
        from megatron.core import parallel_state

        self.ogpsa.detach()
        parallel_state.destroy_model_parallel()

    def gradient(self, shift: int = 0) -> None:
        """The gradient of the step's micro-batches; ``shift`` gives those of a reference."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter([(tokens + shift) % self._args.vocabulary for tokens in self._tokens]),
            model=[self.chunk],
            num_microbatches=self._args.accumulate,
            seq_length=self._args.seq_length,
            micro_batch_size=self._args.micro_batch_size,
            forward_only=False,
        )

    def references(self) -> Iterator[str]:
        """Computes the gradient of each reference in turn, and gives its name."""
        for index in range(self._args.rank):
            self.gradient(shift=1 + index)
            yield f"reference {index}"

    def step(self) -> None:
        """One training step."""
        self.gradient()
        self.optimizer.step()

    def refresh(self) -> None:
        """Computes the basis anew."""
        self.ogpsa.begin_refresh()
        for name in self.references():
            self.ogpsa.capture(name)
        self.ogpsa.finish_refresh()

    def projected_step(self) -> None:
        """One training step with the projection."""
        self.ogpsa.enabled = True
        self.step()
        self.ogpsa.enabled = False


def _has_gpu() -> bool:
    return not install_if_no_gpu()


def _model_and_optimizer(args: argparse.Namespace) -> tuple[Any, Any]:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.module import Float16Module

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.hidden_size // 64,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=args.bf16,
        calculate_per_token_loss=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
    )
    spec = (
        get_gpt_layer_with_transformer_engine_spec()
        if args.transformer_impl == "transformer_engine"
        else get_gpt_layer_local_spec(normalization="RMSNorm")
    )
    module: torch.nn.Module = GPTModel(
        config,
        spec,
        vocab_size=args.vocabulary,
        max_sequence_length=args.seq_length,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    )
    if _has_gpu():
        module.cuda()
    if args.bf16:
        module = Float16Module(config, module)
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    chunk = DistributedDataParallel(config, ddp_config, module)
    config.finalize_model_grads_func = finalize_model_grads  # without it schedules leave gradients to each rank
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-5, use_distributed_optimizer=True, clip_grad=1.0, bf16=args.bf16, params_dtype=dtype
    )
    return chunk, get_megatron_optimizer(optimizer_config, [chunk], use_gloo_process_groups=False)


def _forward_step(iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)
    length = tokens.shape[1] - 1
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = output.float().sum()
        # Filled there: a number that is copied from the host would make it wait in each micro-batch.
        return total, torch.full((), output.numel(), dtype=torch.int, device=output.device), {}

    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), loss


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
    backend = "nccl" if _has_gpu() else "gloo"
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
        if _has_gpu():
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


def versions() -> dict[str, str]:
    """Of what a step on a GPU is made of, where it is installed."""
    found = {}
    for name in ("torch", "triton", "megatron-core", "transformer-engine"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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
