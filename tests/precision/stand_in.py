"""What is asked of Transformer Engine at start, with answers that a test gives; what it does: tests/transformer_engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar


class FP8GlobalStateManager:
    """Its answers about the GPU."""

    answers: ClassVar[dict[str, tuple[bool, str]]] = {}

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None: ...

    @classmethod
    def is_fp8_available(cls) -> tuple[bool, str]:
        return cls.answers.get("fp8", (True, ""))

    @classmethod
    def is_fp8_block_scaling_available(cls) -> tuple[bool, str]:
        return cls.answers.get("blockwise", (True, ""))

    @classmethod
    def is_mxfp8_available(cls) -> tuple[bool, str]:
        return cls.answers.get("mxfp8", (True, ""))


class TransformerEngineBaseModule:
    """The methods with which state is read and put back."""

    def get_fp8_meta_tensors(self) -> Any: ...

    def reset_fp8_meta_tensors(self, fp8_meta_tensors: Any = None) -> None: ...


@contextmanager
def installed() -> Iterator[None]:
    """Let ``transformer_engine`` and Megatron's way to it mean the above, until the end."""
    from megatron.core import fp8_utils

    names = ["transformer_engine", *(f"transformer_engine.{n}" for n in ("pytorch", "pytorch.module"))]
    modules = {name: ModuleType(name) for name in [*names, "transformer_engine.pytorch.module.base"]}
    modules["transformer_engine.pytorch.module.base"].TransformerEngineBaseModule = TransformerEngineBaseModule  # type: ignore[attr-defined]
    sys.modules |= modules
    fp8_utils.FP8GlobalStateManager = FP8GlobalStateManager
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        del fp8_utils.FP8GlobalStateManager
        FP8GlobalStateManager.answers = {}
