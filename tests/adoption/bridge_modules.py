"""Megatron-Bridge as far as a callback sees it, on machines where all of it cannot be imported.

Its callbacks are a file that imports nothing else of it: they are the real ones where a wheel or an installation is found
(``MEGATRON_BRIDGE_WHEEL`` names a wheel), and otherwise those of :mod:`tests.adoption.bridge_interface`. Its loop is
:func:`tests.adoption.bridge_loop.finetune`, which fires the events in Bridge's order.
"""

from __future__ import annotations

import inspect
import os
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

TRAINING = "megatron/bridge/training"


def real_source(file: str) -> str | None:
    """The text of a file of Megatron-Bridge's ``training`` folder, if there is a Megatron-Bridge."""
    if wheel := os.environ.get("MEGATRON_BRIDGE_WHEEL"):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"{TRAINING}/{file}").decode()
    try:
        return Path(str(distribution("megatron-bridge").locate_file(f"{TRAINING}/{file}"))).read_text(encoding="utf-8")
    except PackageNotFoundError:
        return None


def callbacks_module(*, real: bool) -> ModuleType:
    """``megatron.bridge.training.callbacks``."""
    if not real:
        from tests.adoption import bridge_interface

        return bridge_interface
    source = real_source("callbacks.py")
    assert source is not None
    module = ModuleType("megatron.bridge.training.callbacks")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, "callbacks.py", "exec"), vars(module))
    return module


def prepare_forward_step_func(forward_step_func: Any, state: Any) -> Any:
    """Binds the state to forward steps that take it, by the first parameter's name as Bridge's does."""
    first = next(iter(inspect.signature(forward_step_func).parameters))
    return partial(forward_step_func, state) if first in ("state", "global_state") else forward_step_func


@contextmanager
def bridge_modules(*, real: bool, **training: Any) -> Iterator[None]:
    """Let ``megatron.bridge`` be importable; ``training`` gives functions of modules by their name."""
    top = "megatron.bridge"
    names = [top, f"{top}.training", f"{top}.training.utils", f"{top}.training.utils.train_utils"]
    names += [f"{top}.training.{name}" for name in (*training, "callbacks")]
    ours = [f"megatron_ogpsa.integration.bridge{module}" for module in ("", ".callback", ".settings")]
    saved = {name: sys.modules.pop(name, None) for name in (*names, *ours)}
    try:
        for name in names[:-1]:
            sys.modules[name] = ModuleType(name)
        sys.modules[names[-1]] = callbacks_module(real=real)
        sys.modules[names[1]].callbacks = sys.modules[names[-1]]  # type: ignore[attr-defined]
        sys.modules[names[3]].prepare_forward_step_func = prepare_forward_step_func  # type: ignore[attr-defined]
        for name, function in training.items():
            setattr(sys.modules[f"{top}.training.{name}"], function.__name__, function)
        yield
    finally:
        for name, module in saved.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
