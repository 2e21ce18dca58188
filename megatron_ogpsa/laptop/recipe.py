"""Files of a run: safety data, and the configurations of SFT→DPO for two cores and a short time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.laptop.safety_data import held_out_prompts, training_examples
from megatron_ogpsa.study.settings import Setting
from megatron_ogpsa.system.files import write_atomically

NUM_SAMPLES, SAMPLE_BYTES = 64, 2**16
"""Pieces of a file by which a model is known again without reading all of it."""

HELD_OUT = 96
"""General conversations that are scored, at most. With 24 of them a run that cost the protected ones 0.08 seemed to gain
0.05: few of a mixed source are not like any others of it."""

_OF_THE_MODEL = (".json", ".safetensors", ".jinja", ".model")
"""Files that decide what a model answers; chat templates and SentencePiece's tokenizers have their own."""

_COLUMNS = ("messages", "prompt", "response")
"""Of a conversation (``megatron_ogpsa/data/messages.py``)."""

LONGEST = 700
"""Characters of a general conversation as JSON: about 130 tokens, so that none is cut and many fit into the time."""

ROWS = {"sft": 2, "dpo": 4}
"""Packed rows in a batch."""

PAIRS_IN_ROW = 2
"""About as many fit."""

WARMUP = 10
"""Steps. Adam's first ones have about the full rate's length in every weight, whatever the gradient's size."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is trained and scored.

    Attributes:
        sft_steps, dpo_steps: of the optimizer.
        save_interval: steps between the checkpoints that are scored. A refresh follows each.
        refresh_interval: steps between refreshes; a divisor of the former, or else there are more of them.
        early_refreshes: whether there are more of them at first (``--ogpsa-early-refreshes``), where the interval does not
            adapt.
        refresh_warmup: before each of so many steps there is one (``--ogpsa-refresh-warmup-iters``), likewise.
        adaptive_interval: share of each reference gradient that is to stay in the basis until the next refresh, which comes
            every 1 to ``refresh_interval`` steps for it (``--ogpsa-adaptive-interval``); None: every ``refresh_interval``.
        references: general conversations whose gradients are protected.
        parts: how many gradients, each of a part of these conversations.
        sft_lr, dpo_lr: peak learning rates.
        bf16: parameters and activations in bfloat16, with fp32 main parameters: faster where the CPU multiplies it
            (``avx512_bf16`` or ``amx_bf16`` in ``lscpu``), and slower elsewhere.
        seq_length: tokens of a packed row.
    """

    sft_steps: int = 10
    dpo_steps: int = 5
    save_interval: int = 5
    refresh_interval: int = 5
    early_refreshes: bool = True
    refresh_warmup: int = 0
    adaptive_interval: float | None = None
    references: int = 8
    parts: int = 1
    sft_lr: float = 3.0e-5
    dpo_lr: float = 2.0e-5
    bf16: bool = False
    seq_length: int = 256

    def steps(self) -> Iterator[tuple[str, int]]:
        """(stage, step) of each checkpoint that is scored, in order."""
        for stage, last in (("sft", self.sft_steps), ("dpo", self.dpo_steps)):
            yield from ((stage, step) for step in range(self.save_interval, last, self.save_interval))
            yield stage, last


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Where the files of one seed lie, and how long it trains.

    Attributes:
        out: folder of all seeds; ``start`` and what is scored lie there.
        general: source of general conversations: short ones are taken, the first to be protected, those after them scored.
    """

    out: Path
    seed: int
    general: str
    num_ranks: int
    sizes: Sizes

    @property
    def start(self) -> Path:
        """The model as it came, as a Megatron checkpoint."""
        return self.out / "start"

    @property
    def folder(self) -> Path:
        """This seed's own."""
        return self.out / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        """What is scored and protected, for all seeds alike."""
        return self.out / "data"

    def write_data(self) -> None:
        """Write data sets and prompts.

        Raises:
            UserError: the general conversations cannot be read, or are too few; or other data are there already.
        """
        general = self._general()
        _keep(self.data / "references.jsonl", general[: self.sizes.references])
        _keep(self.data / "general.jsonl", general[self.sizes.references :])
        for name, prompts in zip(("unsafe", "benign"), held_out_prompts(), strict=True):
            _keep(self.data / f"{name}.jsonl", ({"prompt": prompt} for prompt in prompts))
        examples = training_examples(self.seed)
        _keep(self.folder / "sft.jsonl", ({"prompt": e.prompt, "response": e.chosen} for e in examples))
        # Log-probabilities of the reference policy are taken of all pairs: no more than are trained on.
        pairs = examples[: PAIRS_IN_ROW * ROWS["dpo"] * self.sizes.dpo_steps]
        _keep(
            self.folder / "dpo.jsonl",
            ({"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in pairs),
        )

    def _general(self) -> list[object]:
        wanted = self.sizes.references + HELD_OUT
        found: list[object] = list(islice(_short_conversations(self.general), wanted))
        if len(found) <= self.sizes.references:
            raise UserError(
                f"--general {self.general}: {len(found)} conversations of at most {LONGEST} characters are too few, as "
                f"{self.sizes.references} are protected and others scored: lower --references, or give more"
            )
        return found

    def write_config(self, name: str, setting: Setting) -> Path:
        """Write the file that trains one setting; it can be run by hand."""
        path = self.folder / f"{name}.yaml"
        write_atomically(path, yaml.safe_dump(self.config(name, setting), sort_keys=False).encode())
        return path

    def config(self, name: str, setting: Setting) -> dict[str, Any]:
        """SFT and DPO on safety data, all alike but for the projection away from the gradient of general conversations."""
        return {
            "launch": {"nproc-per-node": self.num_ranks},
            "model": str(self.start),
            "seed": self.seed,
            "use-distributed-optimizer": True,
            "seq-length": self.sizes.seq_length,
            "max-position-embeddings": 2 * self.sizes.seq_length,
            "attention-dropout": 0.0,
            "hidden-dropout": 0.0,
            "micro-batch-size": 1,
            "lr-decay-style": "cosine",
            "weight-decay": 0.0,
            "adam-beta2": 0.95,
            "clip-grad": 1.0,
            "log-interval": 1,
            "ckpt-format": "torch_dist",
            **({"bf16": True} if self.sizes.bf16 else {}),
            "save": str(self.training(name)),
            "save-interval": self.sizes.save_interval,
            "no-save-optim": True,  # a checkpoint is to be scored: a third of the bytes
            "ogpsa-packing": True,
            **(self._protection(setting) if setting.projected else {}),
            "stages": {stage: self._stage(stage) for stage in ("sft", "dpo")},
        }

    def _protection(self, setting: Setting) -> Mapping[str, Any]:
        return {
            "ogpsa-reference": {"general": str(self.data / "references.jsonl")},
            "ogpsa-reference-samples": self.sizes.references,
            "ogpsa-rank-per-reference": self.sizes.parts,
            "ogpsa-reference-loss": ["nll"],
            "ogpsa-refresh-interval": self.sizes.refresh_interval,
            **({"ogpsa-adaptive-interval": share} if (share := self.sizes.adaptive_interval) is not None else {}),
            **setting.flags,
            "ogpsa-early-refreshes": self.sizes.early_refreshes and self.sizes.adaptive_interval is None,
            **({"ogpsa-refresh-warmup-iters": steps} if (steps := self.sizes.refresh_warmup) else {}),
        }

    def _stage(self, stage: str) -> dict[str, Any]:
        steps, rate = {
            "sft": (self.sizes.sft_steps, self.sizes.sft_lr),
            "dpo": (self.sizes.dpo_steps, self.sizes.dpo_lr),
        }[stage]
        return {
            "ogpsa-stage": stage,
            "ogpsa-train-data": str(self.folder / f"{stage}.jsonl"),
            "global-batch-size": ROWS[stage],
            "train-iters": steps,
            "lr": rate,
            "lr-warmup-iters": min(WARMUP, steps // 4),
        }

    def training(self, name: str) -> Path:
        """One setting's checkpoints, in a folder for each stage."""
        return self.folder / name

    def exported(self, name: str) -> Path:
        """One setting's tuned model as a Hugging Face folder."""
        return self.folder / "models" / name


def keep_model(out: Path, model: Path) -> None:
    """Note which model the runs in ``out`` begin with: its configuration, tokenizer, chat template, samples of its weights.

    Raises:
        UserError: those that are there began with another.
        OSError: a file cannot be read or written.
    """
    files = sorted(path for path in model.iterdir() if path.suffix in _OF_THE_MODEL and path.is_file())
    _keep(out / "model.json", ([path.name, _digest_of_samples(path)] for path in files), "from another model")


def _digest_of_samples(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's length and of pieces all over it."""
    length = path.stat().st_size
    digest = hashlib.sha256(str(length).encode())
    with path.open("rb") as file:
        for number in range(NUM_SAMPLES):
            file.seek(max(0, length - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _short_conversations(source: str) -> Iterator[dict[str, object]]:
    """Each once, so that what is scored is not protected itself; without other columns, whose values may not be JSON's.

    Raises:
        UserError: a row on the way is no conversation.
    """
    seen = set()
    for where, row in open_source(source).rows():
        messages_from_row(row, where)  # the copy of it would be told of, after the model is converted
        kept = {name: row[name] for name in _COLUMNS if isinstance(row, dict) and name in row}
        text = json.dumps(kept)
        if len(text) <= LONGEST and text not in seen:
            seen.add(text)
            yield kept


def _keep(path: Path, rows: Iterable[object], other: str = "with other data") -> None:
    """Write the rows; what an earlier run has scored is only worth something if they were the same."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.exists() and path.read_bytes() != text:
        raise UserError(f"--out: {path} is of a run {other}: name another folder, or remove it")
    write_atomically(path, text)
