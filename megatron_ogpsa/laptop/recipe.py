"""Files of a run: safety data, and the configuration of SFT→DPO with OGPSA for two cores and a short time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.files import write_atomically
from megatron_ogpsa.laptop.safety_data import BENIGN, HELD_OUT_BENIGN, HELD_OUT_UNSAFE, REFUSALS, UNSAFE

HELD_OUT = 24
"""General conversations that are scored."""

ANSWERED = 2
"""Times that each harmless look-alike stands in the data: refusals are shorter, and few of them are learnt as "always"."""

COMPLIANCE = "Sure! Here is what you need to do. First,"
"""How an answer begins that gives an unsafe request what it wants."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where a run's files lie, and how long it trains.

    Attributes:
        general: source of general conversations.
        references: how many of them have their gradient protected; those after them are scored.
    """

    out: Path
    general: str
    num_ranks: int
    sft_steps: int
    dpo_steps: int
    references: int
    seq_length: int = 256

    @property
    def start(self) -> Path:
        """The model as it came, as a Megatron checkpoint."""
        return self.out / "start"

    @property
    def tuned(self) -> Path:
        """The checkpoints of the last stage."""
        return self.out / "training" / "dpo"

    @property
    def exported(self) -> Path:
        """The tuned model as a Hugging Face folder."""
        return self.out / "model"

    def write(self) -> Path:
        """Write the data and the configuration; returns the latter's path.

        Raises:
            UserError: the general conversations cannot be read, or are too few.
        """
        data = self.out / "data"
        rows = [row for _, row in islice(open_source(self.general).rows(), self.references + HELD_OUT)]
        if len(rows) <= self.references:
            raise UserError(
                f"--general {self.general}: {len(rows)} conversations are too few, as {self.references} are protected and "
                "others scored: lower --references, or give more"
            )
        _write_rows(data / "general.jsonl", rows[: self.references])
        _write_rows(data / "general-held-out.jsonl", rows[self.references :])
        refused = [(request, REFUSALS[index % len(REFUSALS)]) for index, request in enumerate(UNSAFE)]
        _write_rows(
            data / "safety.jsonl",
            ({"prompt": prompt, "response": answer} for prompt, answer in (*refused, *BENIGN * ANSWERED)),
        )
        pairs = [(prompt, answer, COMPLIANCE) for prompt, answer in refused]
        pairs += [
            (prompt, answer, REFUSALS[index % len(REFUSALS)])
            for index, (prompt, answer) in enumerate(BENIGN * ANSWERED)
        ]
        _write_rows(
            data / "pairs.jsonl",
            ({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs),
        )
        _write_rows(data / "unsafe.jsonl", ({"prompt": prompt} for prompt in HELD_OUT_UNSAFE))
        _write_rows(data / "benign.jsonl", ({"prompt": prompt} for prompt in HELD_OUT_BENIGN))
        path = self.out / "laptop.yaml"
        write_atomically(path, yaml.safe_dump(self.config(), sort_keys=False).encode())
        return path

    def config(self) -> dict[str, Any]:
        """SFT and DPO on safety data, the updates projected away from the gradient of general conversations."""
        data = self.out / "data"
        return {
            "launch": {"nproc-per-node": self.num_ranks},
            "model": str(self.start),
            "use-distributed-optimizer": True,
            "seq-length": self.seq_length,
            "max-position-embeddings": 2 * self.seq_length,
            "attention-dropout": 0.0,
            "hidden-dropout": 0.0,
            "micro-batch-size": 1,
            "lr-decay-style": "cosine",
            "lr-warmup-iters": 1,
            "weight-decay": 0.0,
            "adam-beta2": 0.95,
            "clip-grad": 1.0,
            "log-interval": 1,
            "ckpt-format": "torch_dist",
            "save": str(self.out / "training"),
            "ogpsa-packing": True,
            "ogpsa-space": "update",
            "ogpsa-reference": {"general": str(data / "general.jsonl")},
            "ogpsa-reference-samples": self.references,
            "ogpsa-reference-loss": ["nll"],
            "stages": {
                "sft": {
                    "ogpsa-train-data": str(data / "safety.jsonl"),
                    "global-batch-size": 4,
                    "train-iters": self.sft_steps,
                    "save-interval": self.sft_steps,
                    "lr": 2.0e-5,
                    "ogpsa-refresh-interval": 10,
                },
                "dpo": {
                    "ogpsa-stage": "dpo",
                    "ogpsa-train-data": str(data / "pairs.jsonl"),
                    "global-batch-size": 4,
                    "train-iters": self.dpo_steps,
                    "save-interval": self.dpo_steps,
                    "lr": 1.0e-5,
                    "ogpsa-refresh-interval": 5,
                },
            },
        }


def _write_rows(path: Path, rows: Iterable[object]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
