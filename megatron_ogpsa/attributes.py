"""Attributes of objects that are not ours, which have other values for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def attributes_set(settings: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Each (owner, name, value) holds inside; then what was there is put back, also when something raises.

    The same attribute may be named more than once: the last value holds, and its first is put back.

    Raises:
        AttributeError: an owner has no such attribute; nothing is changed then.
    """
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in settings]
    for owner, name, value in settings:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
