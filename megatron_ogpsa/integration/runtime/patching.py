"""Patches as data: each names its target and its reason, and a target that is not there is an error, not a silence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_ogpsa.errors import UserError

MEGATRON_SERIES = "0.19."
"""The megatron-core releases whose internals the patches of this package were checked on."""

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


def require_supported_megatron() -> None:
    """Refuse a Megatron whose internals were never checked, rather than patch it half.

    Raises:
        UserError: megatron-core is absent or of another series than :data:`MEGATRON_SERIES`.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("megatron-core")
    except PackageNotFoundError:
        raise UserError(f"megatron-core is not installed: pip install 'megatron-core=={MEGATRON_SERIES}*'") from None
    if not installed.startswith(MEGATRON_SERIES):
        raise UserError(
            f"megatron-core {installed} is installed, but megatron-ogpsa hooks into the internals of {MEGATRON_SERIES}x: "
            f"pip install 'megatron-core=={MEGATRON_SERIES}*'"
        )


def resolve(target: str) -> tuple[Any, str]:
    """What holds the attribute, and its name there."""
    module_name, _, attribute = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name
