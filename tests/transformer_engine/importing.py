"""Put Transformer Engine's Python and the emulated extension together, in this process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch

from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu
from tests.transformer_engine import extension
from tests.transformer_engine.wheel import python_of_wheel

HOPPER = (9, 0)
BLACKWELL = (10, 0)

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
    os.environ.setdefault("NVTE_FLASH_ATTN", "0")
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    sys.modules[extension.NAME] = extension.build()
    for name in ONNX:
        sys.modules.setdefault(name, _Unused(name))
    _import_package(folder)
    install_if_no_gpu()
    _be_a_gpu(capability)


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
    is_available, is_cuda = torch.cuda.is_available, torch.Tensor.is_cuda.__get__
    torch.cuda.is_available = lambda: _asked_by_transformer_engine() or is_available()
    torch.Tensor.is_cuda = property(lambda self: _asked_by_transformer_engine() or is_cuda(self))  # type: ignore[assignment]


def _asked_by_transformer_engine() -> bool:
    """Its modules refuse to work without a GPU; all others are to know that there is none."""
    return str(sys._getframe(2).f_globals.get("__name__")).startswith("transformer_engine.")
