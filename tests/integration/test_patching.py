"""Patches: each once, and never two of one target, of which the second would have been passed over."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from megatron_ogpsa.integration.runtime import patching
from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with a function to be patched."""
    module = ModuleType("patched_here")
    module.number = lambda: 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(patching, "_applied", {})
    return module


def _adding(number: int, reason: str = "adds", attribute: str = "number") -> Patch:
    return Patch(
        target=f"patched_here:{attribute}", reason=reason, replace=lambda original: lambda: original() + number
    )


def test_a_patch_is_applied_once(patched: ModuleType) -> None:
    apply_patches([_adding(1)])
    apply_patches([_adding(1)])
    assert patched.number() == 2


def test_a_second_patch_of_one_target_is_an_error(patched: ModuleType) -> None:
    apply_patches([_adding(1)])
    with pytest.raises(RuntimeError, match="patched_here:number has a patch for another reason already: adds"):
        apply_patches([_adding(2, reason="adds more")])


def test_a_target_that_is_not_there_is_an_error(patched: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="cannot patch patched_here:letter: there is no such attribute"):
        apply_patches([_adding(1, attribute="letter")])
