"""Megatron's parser in a moment: it parses the sources of Megatron's settings, half a second's work that each parser repeats.

A rank builds four parsers, and so do many tests.
"""

from __future__ import annotations

from typing import Any


def keep_docstrings() -> None:
    """From now on each class of settings is parsed once in this process and those forked from it. Imports Megatron."""
    from megatron.training.argument_utils import ArgumentGroupFactory

    read = ArgumentGroupFactory._get_field_docstrings
    if read.__module__ == __name__:
        return
    known: dict[type, dict[str, str]] = {}

    def read_once(self: Any, settings: type) -> dict[str, str]:
        if settings not in known:
            known[settings] = read(self, settings)
        return dict(known[settings])

    ArgumentGroupFactory._get_field_docstrings = read_once
