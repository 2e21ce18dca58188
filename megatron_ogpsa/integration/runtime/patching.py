"""Patches as data: each names its target and its reason, and a target that is not there is an error, not a silence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_applied: dict[str, str] = {}
"""Targets, and the reasons of their patches."""


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One attribute replaced, and why.

    ``target`` is ``package.module:attribute`` (the attribute may be dotted, ``Tensor.cuda``); ``replace`` gets the
    original and returns what stands in its place.
    """

    target: str
    reason: str
    replace: Callable[[Any], Any]


def apply_patches(patches: Iterable[Patch]) -> None:
    """Apply each patch once in the life of the process; a second call is a no-op.

    Raises:
        RuntimeError: a target does not exist, so this Torch or Megatron is not the one the patch was written for; or it has
            another patch already, which would have been passed over.
    """
    for patch in patches:
        if patch.target in _applied:
            if _applied[patch.target] != patch.reason:
                raise RuntimeError(f"{patch.target} has a patch for another reason already: {_applied[patch.target]}")
            continue
        owner, name = resolve(patch.target)
        original = getattr(owner, name, None)
        if original is None:
            raise RuntimeError(f"cannot patch {patch.target}: there is no such attribute ({patch.reason})")
        setattr(owner, name, patch.replace(original))
        _applied[patch.target] = patch.reason


def resolve(target: str) -> tuple[Any, str]:
    """What holds the attribute, and its name there."""
    module_name, _, attribute = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name
