"""The YAML configs of the demo: the same files that a user would write and can run by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.demo.benchmark import Benchmark
from megatron_ogpsa.demo.tasks import GENERAL_TASKS

Settings = dict[str, Any]

SEQUENCE_LENGTH = 32
"""Tokens of the longest conversation. A row of DPO holds two: the answers of a pair."""

MODEL: Settings = {
    "num-layers": 3,
    "hidden-size": 96,
    "ffn-hidden-size": 256,
    "num-attention-heads": 4,
    "group-query-attention": True,
    "num-query-groups": 2,
    "swiglu": True,
    "normalization": "RMSNorm",
    "disable-bias-linear": True,
    "untie-embeddings-and-output-weights": True,
    "position-embedding-type": "rope",
    "attention-dropout": 0.0,
    "hidden-dropout": 0.0,
    "max-position-embeddings": 2 * SEQUENCE_LENGTH,
}


@dataclass(frozen=True)
class Variant:
    """A model that is compared.

    Attributes:
        title: what tables and plots call it.
        config: the file that trains it, without ``.yaml``; also its folder, if there is no stage.
        stage: the stage of that file, or None for a file without stages.
        against: the plain variant that says what its tax would be without projection; None for plain ones.
        projection: one of :data:`PROJECTIONS`, or None for plain ones.
    """

    title: str
    config: str
    stage: str | None
    against: str | None = None
    projection: str | None = None

    def checkpoint(self, out: Path) -> Path:
        return out / self.config / (self.stage or "")


START = "start"
VARIANTS = {
    "sft": Variant("SFT", "plain", "sft"),
    "sft-paper": Variant("SFT paper", "paper", "sft", against="sft", projection="paper"),
    "sft-ogpsa": Variant("SFT OGPSA", "ogpsa", "sft", against="sft", projection="ogpsa"),
    "sft-model": Variant("SFT by model", "model", "sft", against="sft", projection="model"),
    "dpo": Variant("DPO", "dpo-plain", None),
    "dpo-ogpsa": Variant("DPO OGPSA", "dpo-ogpsa", None, against="dpo", projection="ogpsa"),
    "sft-dpo": Variant("SFT→DPO", "plain", "dpo"),
    "sft-dpo-ogpsa": Variant("SFT→DPO OGPSA", "ogpsa", "dpo", against="sft-dpo", projection="ogpsa"),
}
"""In the order of the table. Those with a projection protect one reference for each general task."""

PROJECTIONS: dict[str, Settings] = {
    "paper": {"ogpsa-space": "gradient", "ogpsa-mode": "orthogonal", "ogpsa-early-refreshes": False},
    "ogpsa": {},
    "model": {"ogpsa-granularity": "model"},
}
"""The paper's rule, by which the gradient of each logical tensor is projected, at one interval; the default one, which a user
has who gives no flag, of what Adam makes of each; and the same of the whole model at once."""


@dataclass(frozen=True, kw_only=True)
class DemoSizes:
    """Steps, batch sizes (conversations or pairs) and learning rates.

    Chosen on plain runs of seeds 1 to 3: all of them then refuse 98 % of unsafe requests or more, tell harmless ones apart
    and pay a tax, 3 to 17 points of general accuracy in SFT and 8 to 14 in DPO. At 2e-4 and 7e-4 only some learnt theirs.
    DPO has RPO's likelihood term: a model that has never refused otherwise learns within these steps that help is wrong, and
    not what is right. On its own it needs a larger rate than after SFT to get there.
    """

    base_steps: int = 900
    base_batch: int = 64
    base_lr: float = 4e-3
    sft_steps: int = 120
    sft_batch: int = 32
    sft_lr: float = 7e-4
    dpo_steps: int = 100
    dpo_batch: int = 16
    dpo_lr: float = 1e-3
    dpo_after_sft_lr: float = 1e-4
    dpo_nll_weight: float = 1.0
    reference_samples: int = 128
    base_conversations: int = 24_000
    safety_conversations: int = 3200
    eval_per_task: int = 64
    variants: tuple[str, ...] = tuple(VARIANTS)
    whole_pipelines: bool = False
    """Run both stages with one command, which saves time and gives them one log."""

    def reduced(self) -> DemoSizes:
        """SFT and SFT→DPO, plain and with updates projected, in fewer steps than it takes to learn much.

        Starting a job takes 12 s on two cores: most of the time goes into it.
        """
        return replace(
            self,
            base_steps=100,
            base_conversations=4000,
            safety_conversations=960,  # of SFT's steps: the reference policy of DPO is asked about all of them
            eval_per_task=24,
            sft_steps=30,
            dpo_steps=20,
            reference_samples=32,
            variants=("sft", "sft-ogpsa", "sft-dpo", "sft-dpo-ogpsa"),
            whole_pipelines=True,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one run of the demo trains with."""

    benchmark: Benchmark
    sizes: DemoSizes
    out: Path
    num_ranks: int
    seed: int

    @property
    def base(self) -> Path:
        """Checkpoints of the starting model."""
        return self.out / "base"

    @property
    def variants(self) -> dict[str, Variant]:
        """What is trained and compared, in the order of the table."""
        return {name: VARIANTS[name] for name in self.sizes.variants}

    def configs(self) -> dict[str, Settings]:
        """Every file of fine-tuning by its name: SFT→DPO as pipelines, and DPO of the starting model."""
        files: dict[str, Settings] = {}
        for name, projection in {"plain": None, **PROJECTIONS}.items():
            stages = {"sft": self.sft(), "dpo": self._dpo(projection, self.sizes.dpo_after_sft_lr)}
            files[name] = {**self.start(name, projection), "stages": stages}
            alone = self._dpo(projection, self.sizes.dpo_lr)
            files[f"dpo-{name}"] = {**self.start(f"dpo-{name}", projection), **alone}
        return files

    def base_config(self) -> Settings:
        """Training of the starting model, from nothing, on all general tasks and on helping with any request."""
        sizes = self.sizes
        return {
            **self._common(),
            "seq-length": SEQUENCE_LENGTH,
            "ogpsa-train-data": str(self.benchmark.base_train),
            **self._schedule(sizes.base_steps, sizes.base_batch, sizes.base_lr),
            "lr-warmup-iters": sizes.base_steps // 20,
            "init-method-std": 0.05,
            "save": str(self.base),
        }

    def evaluation_config(self) -> Settings:
        """One model replica on each rank, whatever layout trained it."""
        return {
            **self._common(),
            "seq-length": SEQUENCE_LENGTH,
            "tensor-model-parallel-size": 1,
            "ogpsa-train-data": str(self.benchmark.safety_train),
            **self._schedule(1, 32 * self.num_ranks, 1e-3),
            "micro-batch-size": 32,
        }

    def start(self, name: str, projection: Settings | None) -> Settings:
        """Fine-tuning from the starting model: on safety data alone, which is where the alignment tax comes from."""
        settings = {**self._common(), "pretrained-checkpoint": str(self.base), "save": str(self.out / name)}
        if projection is not None:
            settings |= {
                "ogpsa-reference": {task.name: str(self.benchmark.reference(task.name)) for task in GENERAL_TASKS},
                "ogpsa-reference-samples": self.sizes.reference_samples,
                **projection,
            }
        return settings

    def sft(self) -> Settings:
        """Data and schedule of SFT on safety data alone."""
        sizes = self.sizes
        return {
            "seq-length": SEQUENCE_LENGTH,
            "ogpsa-train-data": str(self.benchmark.safety_train),
            **self._schedule(sizes.sft_steps, sizes.sft_batch, sizes.sft_lr),
        }

    def _dpo(self, projection: Settings | None, lr: float) -> Settings:
        sizes = self.sizes
        return {
            "ogpsa-stage": "dpo",
            "seq-length": 2 * SEQUENCE_LENGTH,
            "ogpsa-train-data": str(self.benchmark.safety_pairs),
            "ogpsa-dpo-nll-weight": sizes.dpo_nll_weight,
            **({"ogpsa-reference-loss": ["nll"]} if projection is not None else {}),
            **self._schedule(sizes.dpo_steps, sizes.dpo_batch, lr),
        }

    def _common(self) -> Settings:
        return {
            "launch": {"nproc-per-node": self.num_ranks},
            **self._layout(),
            **MODEL,
            "tokenizer-type": "HuggingFaceTokenizer",
            "tokenizer-model": str(self.benchmark.tokenizer),
            "seed": self.seed,
            "log-interval": 1,
            "ckpt-format": "torch_dist",
            "no-save-optim": True,
        }

    def _layout(self) -> Settings:
        """Two ranks: data parallel. Four: tensor and data parallel. Both with the distributed optimizer."""
        return {"use-distributed-optimizer": True, "tensor-model-parallel-size": 2 if self.num_ranks == 4 else 1}

    def _schedule(self, steps: int, batch: int, lr: float) -> Settings:
        data_parallel_size = self.num_ranks // self._layout()["tensor-model-parallel-size"]
        return {
            "micro-batch-size": max(1, batch // data_parallel_size),
            "global-batch-size": batch,
            "train-iters": steps,
            "lr": lr,
            "min-lr": lr / 10,
            "lr-decay-style": "cosine",
            "weight-decay": 0.01,
            "adam-beta2": 0.98,
            "clip-grad": 1.0,
            "save-interval": steps,
        }


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write ``settings`` as YAML; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    return path
