"""Put Transformer Engine's Python and the emulated extension together, in this process."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
from tests.transformer_engine import extension
from tests.transformer_engine.wheel import python_of_wheel

HOPPER = (9, 0)
BLACKWELL = (10, 0)

BROUGHT_BY_TRANSFORMER_ENGINE = (
    "--transformer-impl {0.transformer_impl}",
    "--fp8-format",
    "--multi-latent-attention",
    "--sequence-parallel",
    "--moe-grouped-gemm",
    "--context-parallel-size",
)

ONNX = ("onnxscript", "onnx")
"""What Transformer Engine imports for exports that nobody makes here."""


def install(capability: tuple[int, int] = HOPPER) -> None:
    """Let ``import transformer_engine`` mean the emulation, and the CPU a GPU of that compute capability.

    Call it before ``megatron`` is imported, which looks once for Transformer Engine.

    Raises:
        OSError: the wheel cannot be had.
        RuntimeError: Megatron is imported already.
    """
    if any(name == "megatron" or name.startswith("megatron.") for name in sys.modules):
        raise RuntimeError("Megatron is imported already: it has looked for Transformer Engine and not found it")
    folder = python_of_wheel()
    sys.path.insert(0, str(folder))
    os.environ.setdefault("NVTE_PROJECT_BUILDING", "1")  # or it looks for its libraries
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    sys.modules[extension.NAME] = extension.build()
    for name in ONNX:
        sys.modules.setdefault(name, _Unused(name))
    _import_package(folder)
    install_if_no_gpu()
    _be_a_gpu(capability)
    _gather_one_by_one()
    _save_dequantized()
    _exchange_in_turn()


class _Unused(ModuleType):
    """A module of which any name may be imported and decorated with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def be_hopper() -> None:
    """Prepare a process that runs commands on what Transformer Engine takes for a Hopper GPU."""
    _install_for_commands(HOPPER)


def be_blackwell() -> None:
    """The same on what it takes for a Blackwell GPU."""
    _install_for_commands(BLACKWELL)


def _install_for_commands(capability: tuple[int, int]) -> None:
    """Also let the CPU runtime keep a GPU's defaults, and do without its refusals, of what Transformer Engine brings."""
    install(capability)
    from megatron.core.transformer.enums import AttnBackend

    from megatron_ogpsa.integration.arguments import cpu, parser

    for table in ("WITHOUT_GPU", "TRAINING_WITHOUT_GPU"):
        kept = tuple(refusal for refusal in getattr(cpu, table) if refusal.flag not in BROUGHT_BY_TRANSFORMER_ENGINE)
        setattr(cpu, table, kept)
    set_cpu_defaults = cpu.set_cpu_defaults

    def set_defaults(parser: argparse.ArgumentParser) -> None:
        set_cpu_defaults(parser)
        # Weights that Megatron initialises on the CPU are not those that Transformer Engine keeps for main parameters.
        parser.set_defaults(
            transformer_impl="transformer_engine", use_cpu_initialization=None, attention_backend=AttnBackend.auto
        )

    parser.set_cpu_defaults = set_defaults


def _import_package(folder: Path) -> None:
    """``transformer_engine.common`` before its parent, which would load the compiled extension as it is imported."""
    name = "transformer_engine.common"
    init = folder / "transformer_engine" / "common" / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    assert spec is not None
    assert spec.loader is not None
    common = importlib.util.module_from_spec(spec)
    sys.modules[name] = common
    spec.loader.exec_module(common)
    common.load_framework_extension = lambda framework: None  # type: ignore[attr-defined]
    package = importlib.import_module("transformer_engine")
    package.common = common  # type: ignore[attr-defined]


def _be_a_gpu(capability: tuple[int, int]) -> None:
    """What the CPU runtime does not need to answer for Megatron alone."""
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], name="cpu", multi_processor_count=1, total_memory=1 << 34
    )
    torch.cuda.get_device_properties = lambda device=None: properties  # type: ignore[assignment,return-value]
    torch.cuda.get_device_capability = lambda device=None: capability
    distributed = importlib.import_module("transformer_engine.pytorch.distributed")
    distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
    move = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: _moved(move, self, args, kwargs)  # type: ignore[method-assign]
    # To the host is a copy, whose memory nobody else has.
    cpu = torch.Tensor.cpu
    torch.Tensor.cpu = lambda self: self.clone() if _asked_by_transformer_engine() else cpu(self)  # type: ignore[method-assign,assignment]
    is_available, is_cuda = torch.cuda.is_available, torch.Tensor.is_cuda.__get__
    torch.cuda.is_available = lambda: _asked_by_transformer_engine() or is_available()
    torch.Tensor.is_cuda = property(lambda self: _asked_by_transformer_engine() or is_cuda(self))  # type: ignore[assignment]


def _gather_one_by_one() -> None:
    """Gather each bucket of parameters by itself: gloo would make one message, of one dtype, of FP8 and bf16 ones."""
    buffers = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")

    def gather(whole: Tensor, own: Tensor, *, group: Any, async_op: bool) -> None:
        group._allgather_base(whole, own).wait()

    buffers.dist_all_gather_func = gather  # type: ignore[attr-defined]


def _save_dequantized() -> None:
    """Write FP8 parameters to checkpoints as Megatron does where it sees that they lie on a GPU.

    Source: ``core/dist_checkpointing/strategies/filesystem_async.py``, ``_clone_or_dequantize_if_needed``.
    """
    from torch.distributed.checkpoint import DefaultSavePlanner

    resolve_data = DefaultSavePlanner.resolve_data

    def dequantized(self: DefaultSavePlanner, item: Any) -> Any:
        data = resolve_data(self, item)
        return data.dequantize() if "dequantize" in type(data).__dict__ else data

    DefaultSavePlanner.resolve_data = dequantized  # type: ignore[method-assign]


def _exchange_in_turn() -> None:
    """Pass keys and values around the ring at once: gloo confuses messages that are under way between the same two ranks."""
    ring = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
    numbers = itertools.count()

    def exchange(
        rank: int, sent: Tensor, to: int, received: Tensor, source: int, group: Any, batched: bool
    ) -> list[object]:
        tag = next(numbers)
        requests = [
            dist.isend(sent.contiguous(), to, group, tag),
            dist.irecv(received, source, group, tag),
        ]
        for request in requests:
            assert request is not None
            request.wait()
        return []

    ring.flash_attn_p2p_communicate = exchange  # type: ignore[attr-defined]


def _moved(move: Callable[..., Tensor], tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``Tensor.to`` that leaves a tensor here when it is to go to the GPU."""
    if str(kwargs.get("device")).startswith("cuda"):
        kwargs["device"] = torch.device("cpu")
    if args and str(args[0]).startswith("cuda"):
        args = (torch.device("cpu"), *args[1:])
    return move(tensor, *args, **kwargs)


def _asked_by_transformer_engine() -> bool:
    """Its modules refuse to work without a GPU; all others are to know that there is none."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("transformer_engine.")
