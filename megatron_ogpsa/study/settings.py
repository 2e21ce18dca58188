"""What the study compares, as data: a new setting is one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_ogpsa.references.steps import PAPERS_INTERVAL

Settings = Mapping[str, Any]

ONE_INTERVAL: Settings = {"ogpsa-early-refreshes": False}
UPDATE: Settings = {"ogpsa-space": "update", "ogpsa-mode": "orthogonal", **ONE_INTERVAL}
GRADIENT: Settings = {"ogpsa-space": "gradient", "ogpsa-mode": "orthogonal", **ONE_INTERVAL}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to fine-tune, on the same safety data, from the same starting model.

    Attributes:
        title: what tables and plots call it.
        flags: beside those of plain SFT; with a projection they win over the demo's defaults.
        projected: whether references are protected.
        joined: the samples of all tasks make one reference, in place of one for each task.
        replayed: general rows in each batch for one safety row: the same reference data, trained on.
        save_interval: steps between the checkpoints that are scored; None: the last one alone. A refresh follows each, so
            that it must not be shorter than the refresh interval, nor cut it.
    """

    title: str
    flags: Settings = field(default_factory=dict)
    projected: bool = True
    joined: bool = False
    replayed: int = 0
    save_interval: int | None = 20


PLAIN = "plain"
SETTINGS: dict[str, Setting] = {
    PLAIN: Setting(title="plain", projected=False),
    "default": Setting(
        title="default: update, conflict, every 30 steps and early",
        flags={"ogpsa-refresh-interval": PAPERS_INTERVAL["sft"]},
        save_interval=PAPERS_INTERVAL["sft"],
    ),
    "update-conflict": Setting(title="update, conflict", flags={**UPDATE, "ogpsa-mode": "conflict"}),
    "gradient-tensor": Setting(title="gradient, per tensor", flags=GRADIENT),
    "update-tensor": Setting(title="update, per tensor", flags=UPDATE),
    "gradient-conflict": Setting(title="gradient, conflict", flags={**GRADIENT, "ogpsa-mode": "conflict"}),
    "update-conflict-interval-30": Setting(
        title="update, conflict, every 30 steps",
        flags={**UPDATE, "ogpsa-mode": "conflict", "ogpsa-refresh-interval": 30},
        save_interval=30,
    ),
    # Passes over 7 x 128 references every 10 steps are 90 rows for 32 of safety: as many are trained on instead.
    "replay": Setting(title="replay of the references", projected=False, replayed=3),
    "gradient-leak": Setting(title="gradient, with the authors' leak", flags={**GRADIENT, "ogpsa-authors-leak": True}),
    "gradient-model": Setting(title="gradient, per model", flags={**GRADIENT, "ogpsa-granularity": "model"}),
    "update-model": Setting(title="update, per model", flags={**UPDATE, "ogpsa-granularity": "model"}),
    "update-adaptive": Setting(
        title="update, every 1 to 30 steps",
        flags={**UPDATE, "ogpsa-refresh-interval": 30, "ogpsa-adaptive-interval": 0.5},
        save_interval=None,
    ),
    "update-conflict-adaptive": Setting(
        title="update, conflict, every 1 to 30 steps",
        flags={**UPDATE, "ogpsa-mode": "conflict", "ogpsa-refresh-interval": 30, "ogpsa-adaptive-interval": 0.5},
        save_interval=None,
    ),
    "update-interval-30": Setting(
        title="update, every 30 steps", flags={**UPDATE, "ogpsa-refresh-interval": 30}, save_interval=30
    ),
    "update-interval-5": Setting(title="update, every 5 steps", flags={**UPDATE, "ogpsa-refresh-interval": 5}),
    "update-rank-4": Setting(title="update, 4 gradients each", flags={**UPDATE, "ogpsa-rank-per-reference": 4}),
    "update-joined": Setting(title="update, one reference", flags=UPDATE, joined=True),
    "update-samples-32": Setting(title="update, 32 samples", flags={**UPDATE, "ogpsa-reference-samples": 32}),
    "gradient-rank-4": Setting(title="gradient, 4 gradients each", flags={**GRADIENT, "ogpsa-rank-per-reference": 4}),
    "update-in-turns": Setting(
        title="update, every 30 steps in turns",
        flags={**UPDATE, "ogpsa-refresh-interval": 30, "ogpsa-stagger-references": True},
        save_interval=None,
    ),
    "update-interval-100": Setting(
        title="update, every 100 steps", flags={**UPDATE, "ogpsa-refresh-interval": 100}, save_interval=None
    ),
    "update-interval-1": Setting(title="update, every step", flags={**UPDATE, "ogpsa-refresh-interval": 1}),
}
"""In the order in which they are run: what matters most first, since the study can be stopped at any time."""
