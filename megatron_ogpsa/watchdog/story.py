"""Who is behind, of what the ranks have told: decisions and sentences, without store, threads or clocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

MOST_NAMED = 4
"""Ranks that are told with their places; of further ones only the numbers are."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a rank tells of itself.

    Attributes:
        beat: counts what it has told; a frozen rank's stays.
        told_at: seconds of its node's clock.
        step: that is worked on, None before the first.
        line, collective: as of :class:`~megatron_ogpsa.watchdog.place.Place`.
        standing: seconds that it has stood there.
        has_left: it has finished.
    """

    rank: int
    host: str
    pid: int
    beat: int
    told_at: float
    step: int | None
    phase: str
    line: str
    collective: str | None
    standing: float
    has_left: bool = False

    def to_json(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        """What :meth:`to_json` gave."""
        return cls(**json.loads(text))

    @property
    def identity(self) -> str:
        """``rank 2 (host a, pid 17)``."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def whereabouts(self) -> str:
        """``at step 17 (refresh) in all_reduce (file.py:12)``."""
        when = f"step {self.step}" if self.step is not None else "start"
        if self.step is not None and self.phase != "step":
            when += f" ({self.phase})"
        return f"at {when} in {self.collective} ({self.line})" if self.collective else f"at {when} in {self.line}"


Kind = Literal["unheard", "silent", "busy", "left"]


@dataclass(frozen=True)
class Suspect:
    """A rank that is behind.

    ``unheard``: it has told nothing in this run. ``silent``: it has told nothing between two looks. ``busy``: it tells,
    and does not wait in a collective. ``left``: it has finished.
    """

    rank: int
    kind: Kind
    record: Record | None


def suspects(before: Mapping[int, Record], now: Mapping[int, Record], num_ranks: int) -> list[Suspect]:
    """Ranks that keep the others waiting, from two looks at what all ranks have told.

    The looks must be further apart than ranks take to tell twice. Silent ranks come first; if there are any, busy ones
    are not blamed.
    """
    found: dict[Kind, list[Suspect]] = {"unheard": [], "silent": [], "left": [], "busy": []}
    for rank in range(num_ranks):
        record = now.get(rank)
        kind = _kind(before.get(rank), record)
        if kind is not None:
            found[kind].append(Suspect(rank, kind, record))
    dead = found["silent"] + found["unheard"]
    return dead or found["busy"] + found["left"]


def _kind(before: Record | None, now: Record | None) -> Kind | None:
    if now is None:
        return "unheard"
    if now.has_left:
        return "left"
    if before is not None and before.beat == now.beat:
        return "silent"
    return "busy" if now.collective is None else None


def story(waiting: Record, found: Sequence[Suspect], all_ranks: Mapping[int, Record], now: float) -> str:
    """The line that the user reads.

    Args:
        waiting: the rank that has waited for too long.
        found: by :func:`suspects`.
        now: of the waiting rank's clock; how long another node's rank is silent is as true as their clocks agree.
    """
    has_waited = f"{waiting.identity} has waited for {waiting.standing:.0f} s {waiting.whereabouts}"
    if not found:
        return f"{has_waited}; no rank is frozen or computes, they wait for each other: {_places(all_ranks)}"
    told = "; ".join(_sentence(suspect, now) for suspect in found[:MOST_NAMED])
    if others := found[MOST_NAMED:]:
        told += f"; and so of ranks {', '.join(str(suspect.rank) for suspect in others)}"
    if found[0].kind == "busy":
        told += ". If it is to take so long: raise --ogpsa-hang-timeout and --distributed-timeout-minutes"
    return f"{has_waited}: {told}"


def story_of_silence(waiting: Record, silence: str) -> str:
    """The line where the records cannot be read; ``silence`` says why."""
    return f"{waiting.identity} has waited for {waiting.standing:.0f} s {waiting.whereabouts}: {silence}"


def story_of_loss(failed: Record, error: str, found: Sequence[Suspect], now: float) -> str:
    """The line of a rank whose collective has raised ``error`` because others are gone."""
    told = "; ".join(_sentence(suspect, now) for suspect in found[:MOST_NAMED])
    return f"{failed.identity} has failed {failed.whereabouts} ({error}): {told}"


def _sentence(suspect: Suspect, now: float) -> str:
    record = suspect.record
    if record is None:
        return f"rank {suspect.rank} has never been heard of: it has hung or ended at start"
    if suspect.kind == "left":
        return f"{record.identity} has left the run, last seen {record.whereabouts}"
    if suspect.kind == "silent":
        return (
            f"{record.identity} is frozen or lost: it has not been heard of for {now - record.told_at:.0f} s and was last "
            f"seen {record.whereabouts}"
        )
    return f"{record.identity} is alive and computes {record.whereabouts}, for {record.standing:.0f} s"


def _places(records: Mapping[int, Record]) -> str:
    """Ranks by where they wait."""
    ranks: dict[str, list[int]] = {}
    for rank, record in sorted(records.items()):
        ranks.setdefault(record.whereabouts, []).append(rank)
    return "; ".join(
        f"{'rank' if len(numbers) == 1 else 'ranks'} {', '.join(map(str, numbers))} {where}"
        for where, numbers in ranks.items()
    )
