"""The YAML configs of the demo: the same files that a user would write and can run by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_ogpsa.demo.benchmark import Benchmark
from megatron_ogpsa.demo.tasks import GENERAL_TASKS

Settings = dict[str, Any]

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
    "seq-length": 32,
    "max-position-embeddings": 32,
}


@dataclass(frozen=True, kw_only=True)
class DemoSizes:
    """Steps, batch sizes and learning rates, chosen on seed 1.

    The safety learning rate is small, because the projection keeps general ability to first order only: at 2e-3 one run of
    80 steps moved the weights so far that the projected runs came out worse than the plain one.
    """

    base_steps: int = 900
    base_batch: int = 64
    base_lr: float = 4e-3
    safety_steps: int = 150
    safety_batch: int = 32
    safety_lr: float = 2e-4
    refresh_interval: int = 10


VARIANTS: dict[str, Settings] = {
    "plain": {},
    "tensor": {"ogpsa-granularity": "tensor"},
    "model": {"ogpsa-granularity": "model"},
}
"""Fine-tunings that are compared; each but the first protects one reference for each general task."""


def layout(num_ranks: int) -> Settings:
    """Two ranks: data parallel. Four: tensor and data parallel. Both with the distributed optimizer."""
    return {"use-distributed-optimizer": True, "tensor-model-parallel-size": 2 if num_ranks == 4 else 1}


def base_config(benchmark: Benchmark, sizes: DemoSizes, *, save: Path, num_ranks: int, seed: int) -> Settings:
    """Training of the starting model, from nothing, on all general tasks and on helping with any request."""
    return {
        **_common(benchmark, num_ranks, seed),
        "ogpsa-train-data": str(benchmark.base_train),
        **_schedule(sizes.base_steps, sizes.base_batch, sizes.base_lr, num_ranks),
        "lr-warmup-iters": sizes.base_steps // 20,
        "init-method-std": 0.05,
        "save": str(save),
    }


def variant_config(
    variant: str, benchmark: Benchmark, sizes: DemoSizes, *, start: Path, save: Path, num_ranks: int, seed: int
) -> Settings:
    """Safety fine-tuning of the starting model: on safety data alone, which is where the alignment tax comes from."""
    settings = {
        **_common(benchmark, num_ranks, seed),
        "ogpsa-train-data": str(benchmark.safety_train),
        **_schedule(sizes.safety_steps, sizes.safety_batch, sizes.safety_lr, num_ranks),
        "load": str(start),
        "finetune": True,
        "no-load-optim": True,
        "no-load-rng": True,
        "save": str(save),
    }
    if VARIANTS[variant]:
        settings |= VARIANTS[variant] | {
            "ogpsa-reference": {task.name: str(benchmark.reference(task.name)) for task in GENERAL_TASKS},
            "ogpsa-reference-samples": 128,
            "ogpsa-refresh-interval": sizes.refresh_interval,
        }
    return settings


def evaluation_config(benchmark: Benchmark, num_ranks: int, seed: int) -> Settings:
    """One model replica on each rank, whatever layout trained it."""
    return {
        **_common(benchmark, num_ranks, seed),
        "tensor-model-parallel-size": 1,
        "ogpsa-train-data": str(benchmark.safety_train),
        **_schedule(1, num_ranks, 1e-3, num_ranks),
        "micro-batch-size": 1,  # of no use here, but Megatron checks that batches come out even
    }


def write_config(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write ``settings`` as YAML; returns ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
    return path


def _common(benchmark: Benchmark, num_ranks: int, seed: int) -> Settings:
    return {
        "launch": {"nproc-per-node": num_ranks},
        **layout(num_ranks),
        **MODEL,
        "tokenizer-type": "HuggingFaceTokenizer",
        "tokenizer-model": str(benchmark.tokenizer),
        "seed": seed,
        "log-interval": 1,
        "ckpt-format": "torch_dist",
        "no-save-optim": True,
    }


def _schedule(steps: int, batch: int, lr: float, num_ranks: int) -> Settings:
    data_parallel_size = num_ranks // layout(num_ranks)["tensor-model-parallel-size"]
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
