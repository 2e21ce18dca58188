"""Bars of work that takes more than a moment, with the time that is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

from tqdm import tqdm

DELAY_SECONDS = 3.0
"""What is done sooner shows no bar."""


def progress_bar(
    what: str,
    total: int,
    unit: str,
    *,
    done: int = 0,
    is_shown: bool = True,
    stays: bool = False,
    in_bytes: bool = False,
) -> tqdm[NoReturn]:
    """A bar to be moved on by ``update``.

    Args:
        what: is done, for whoever reads it.
        unit: of ``total``.
        done: before, of these.
        is_shown: on one rank of many.
        stays: when it is closed.
        in_bytes: write large numbers shorter.
    """
    return tqdm(
        desc=what,
        total=total,
        unit=unit,
        unit_scale=in_bytes,
        initial=done,
        delay=DELAY_SECONDS,
        leave=stays,
        disable=not is_shown,
    )


def with_progress[T](
    items: Iterable[T], what: str, total: int, unit: str, *, is_shown: bool = True, stays: bool = False
) -> Iterable[T]:
    """``items``, with a bar that moves on as they are taken.

    Args:
        what, total, unit, is_shown, stays: as of :func:`progress_bar`.
    """
    return tqdm(items, total=total, desc=what, unit=unit, delay=DELAY_SECONDS, leave=stays, disable=not is_shown)


def move_on(bar: tqdm[NoReturn], by: int = 1) -> None:
    """``bar.update`` as a callback, which gives nothing."""
    bar.update(by)
