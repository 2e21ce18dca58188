"""Rows of a public data set, converted, and a sample of them that depends on the seed and the data alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ogpsa.console.progress import with_progress
from megatron_ogpsa.data.messages import type_name
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import write_atomically


@dataclass(frozen=True)
class Drop:
    """Why a sound row is not taken, in words that are counted."""

    reason: str


Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A public data set and what becomes of its rows.

    Attributes:
        name: as the authors' code calls the result.
        source: where it is published, in the form that ``open_source`` takes.
        licence: of the data set, or the page that states it.
        num_rows: taken unless the user says otherwise.
        summary: one line for ``--help``.
        convert: a row of the data set and its place to a row of ours, or why it is dropped; raises UserError if the row
            is not one of this data set.
    """

    name: str
    source: str
    licence: str
    num_rows: int
    summary: str
    convert: Callable[[Row, str], Row | Drop]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was taken.

    Attributes:
        rows: in the order in which they are to be written.
        read: rows of the source.
        fit: of these, the ones that could have been taken.
        dropped: the others by reason.
    """

    rows: list[Row]
    read: int
    fit: int
    dropped: dict[str, int]


def select(recipe: Recipe, source: str, *, num_rows: int, seed: int) -> Selection:
    """Convert every row of ``source`` and draw ``num_rows`` of those that fit, each with equal probability.

    Reservoir sampling (Vitter's algorithm R): the source is read once, and no more than the sample is held. The sample
    is shuffled, so that its first rows are a sample too, as references take them.

    Raises:
        UserError: the source cannot be opened, a row is not of this data set, or too few fit.
    """
    generator = random.Random(seed)
    opened = open_source(source)
    taken: list[Row] = []
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    read = fit = 0
    for where, row in with_progress(opened.rows(), recipe.name, opened.num_rows, " rows", stays=True):
        read += 1
        if not isinstance(row, dict):
            raise UserError(
                f"{where}: a row must be an object, not {type_name(row)}; is this the data set of {recipe.name}?"
            )
        converted = recipe.convert(row, where)
        if not isinstance(converted, Drop):
            digest = hashlib.sha256(_as_line(converted)).digest()
            converted = Drop("the same as an earlier row") if digest in seen else converted
            seen.add(digest)
        if isinstance(converted, Drop):
            dropped[converted.reason] += 1
            continue
        fit += 1
        if len(taken) < num_rows:
            taken.append(converted)
        elif (place := generator.randrange(fit)) < num_rows:
            taken[place] = converted
    if fit < num_rows:
        raise UserError(
            f"--num-rows {num_rows}: of {read} rows of {source} only {fit} can be taken; give a smaller number"
        )
    generator.shuffle(taken)
    return Selection(rows=taken, read=read, fit=fit, dropped=dict(dropped.most_common()))


def write_selection(path: Path, selection: Selection) -> None:
    """JSON Lines; the file is the old one or the new one, whole.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, b"".join(map(_as_line, selection.rows)))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another place") from None


def _as_line(row: Row) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()
