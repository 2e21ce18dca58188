"""What runs of ``megatron-ogpsa train`` in FP8 are held to, on a GPU (tests/gpu) and emulated (tests/transformer_engine)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.integration.checkpoints import differences
from tests.integration.conftest import Outcome, Train, scalars
from tests.integration.test_train import config_without

MODEL = (
    "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --bf16 --seq-length 128 "
    "--micro-batch-size 1 --hidden-dropout 0.0 --attention-dropout 0.0 --untie-embeddings-and-output-weights "
    "--deterministic-mode --no-gradient-accumulation-fusion --lr 1e-3"
).split()
"""Whole tiles of every recipe's quantizers (16, 32 and 128 elements), with the widths that each kind of machine adds."""

IN_BF16 = "--ogpsa-references-in-bf16"

VARIANTS = {
    "": (),
    "param-gather": ("--fp8-param-gather", "--overlap-grad-reduce", "--overlap-param-gather"),
    "param-gather, no overlap": ("--fp8-param-gather",),
    "bf16-ends": (
        "--first-last-layers-bf16",
        *("--num-layers-at-start-in-bf16", "1"),
        *("--num-layers-at-end-in-bf16", "1"),
    ),
    "param-gather, references in bf16": ("--fp8-param-gather", IN_BF16),
    "recompute": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}

IN_E4M3 = [pytest.param("blockwise", id="blockwise e4m3")]
"""A recipe without E5M2, by an id of its own: the figures of ``benchmarks/gpu_tests.py`` go by recipe, and are of hybrid."""


def refusal_of(recipe: str, variant: str) -> str | None:
    """Why a recipe does not go with a variant; None if it does."""
    if variant == "bf16-ends" and recipe == "delayed":
        return "Megatron refuses --first-last-layers-bf16 with delayed scaling"
    if variant == "param-gather" and recipe == "mxfp8":
        return "MXFP8 parameters are gathered through gradient buffers, which is refused with overlap"
    return None


def fp8(recipe: str, variant: str = "", *, number_format: str = "hybrid") -> list[str]:
    """Flags. ``hybrid`` has gradients in E5M2 and all else in E4M3, ``e4m3`` all in E4M3."""
    through_gradients = ("--reuse-grad-buf-for-mxfp8-param-ag",) if recipe == "mxfp8" and "param" in variant else ()
    return ["--fp8-format", number_format, "--fp8-recipe", recipe, *VARIANTS[variant], *through_gradients]


@dataclass(frozen=True)
class Shared:
    """What one test has found and all others use, those of other processes too (``pytest -n``).

    Attributes:
        folder: that they all have.
    """

    folder: Path

    def get(self, name: str, find: Callable[[], Any]) -> Any:
        """What ``find`` gave where it was asked for first: tensors, and dictionaries of them."""
        kept = self.folder / f"{name}.pt"
        with FileLock(kept.with_suffix(".lock")):
            if not kept.exists():
                torch.save(find(), kept)
        return torch.load(kept, weights_only=True)


@dataclass(frozen=True)
class Fp8Training:
    """Runs of one small model, and what is measured on them.

    Attributes:
        train: the command.
        model: flags besides :data:`MODEL`.
        steps: of a run.
        fresh: on a GPU, in new processes: CUDA does not outlive a fork.
        in_bf16: what runs in bf16 gave, which all recipes are compared with.
        record: takes what is measured, by name; pytest's ``record_property``.
    """

    train: Train
    folder: Path
    model: tuple[str, ...]
    steps: int
    fresh: bool
    in_bf16: Shared
    record: Callable[[str, object], None]

    def run(self, name: str, *flags: str, **how: object) -> Outcome:
        """A run that saves at its end into ``name``, with its figures in ``name-log``."""
        steps = ("--train-iters", str(self.steps), "--save-interval", str(self.steps))
        places = ("--save", name, "--tensorboard-dir", f"{name}-log")
        outcome = self.train(*MODEL, *self.model, *steps, *places, *flags, fresh=self.fresh, **how)
        assert outcome.exit_code == 0, outcome.output[-3000:]
        return outcome

    def assert_no_trace(self, flags: list[str]) -> None:
        """Refreshes at each step, projection off: bitwise the run without references, in all figures and the checkpoint."""
        self.run(
            "refreshed",
            *flags,
            *("--ogpsa-refresh-interval", "1", "--ogpsa-reference-samples", "8"),
            module="tests.integration.unprojected",
        )
        config = config_without(self.folder / "plain.yaml", "ogpsa-reference")
        self.run("plain", *flags, references=False, config=config)
        figures, logged = scalars(self.folder / "plain-log"), scalars(self.folder / "refreshed-log")
        assert [*figures["lm loss"]] == [*range(1, self.steps + 1)]
        assert {name: points for name, points in logged.items() if not name.startswith("ogpsa general/")} == figures
        assert self._differences("refreshed", "plain") == []

    def assert_resumes(self, flags: list[str]) -> None:
        """A run that goes on from its checkpoint is bitwise the undisturbed one: scales of ``delayed`` too."""
        half = str(self.steps // 2)
        halves = ("--save-interval", half, "--ogpsa-refresh-interval", "2")
        self.run("whole", *flags, *halves)
        self.run("resumed", *flags, *halves, "--exit-interval", half)
        self.run("resumed", *flags, *halves, "--load", "resumed")
        figures = ("lm loss", "grad-norm", "ogpsa removed length")
        undisturbed = scalars(self.folder / "whole-log", *figures)
        assert scalars(self.folder / "resumed-log", *figures) == undisturbed
        assert self._differences("whole", "resumed") == []

    def _differences(self, one: str, other: str) -> list[str]:
        """Of two checkpoints, beside what is not promised to be the same.

        Extra states are pickles of Transformer Engine's, not promised to be the same bytes; scales show in the figures. And
        iterating a ``DataLoader`` draws a seed from the CPU's generator, once more in a run that goes on from a checkpoint;
        with a GPU nothing else is drawn from it in training.
        """
        ignored = ("_extra_state", *(("torch_rng_state",) if self.fresh else ()))
        found = differences(self.folder / one, self.folder / other)
        return [name for name in found if not any(part in name for part in ignored)]

    def reference_gradients(self, name: str, flags: list[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Of the first refresh, at the first weights: reference → parameter → fp32 gradient."""
        folder = self.folder / name
        folder.mkdir()
        module = "tests.gpu.keeping_gradients"
        self.run("run", *flags, "--train-iters", "1", module=module, folder=folder)
        gradients: dict[str, dict[str, torch.Tensor]] = torch.load(folder / "gradients.pt", weights_only=True)
        return gradients

    def lowest_cosine(self, recipe: str) -> float:
        """Over all references and parameters, of the gradient in FP8 with that in bf16."""
        in_bf16 = self._gradients_in_bf16()
        in_fp8 = self.reference_gradients("fp8", fp8(recipe))
        lowest = 1.0
        for reference, gradients in in_bf16.items():
            cosines = {
                name: float(
                    torch.nn.functional.cosine_similarity(one.flatten(), in_fp8[reference][name].flatten(), dim=0)
                )
                for name, one in gradients.items()
                if one.any()
            }
            worst = min(cosines, key=lambda name: cosines[name])
            mean = sum(cosines.values()) / len(cosines)
            print(
                f"{recipe}: {reference}: lowest cosine {cosines[worst]:.4f} ({worst}), of {len(cosines)} parameters; "
                f"mean {mean:.4f}"
            )
            self.record(f"{reference}: lowest cosine", cosines[worst])
            self.record(f"{reference}: mean cosine", mean)
            lowest = min(lowest, cosines[worst])
        return lowest

    def assert_references_without_fp8(self, recipe: str) -> None:
        """Asked for in bf16, reference gradients are bitwise those of a run in bf16."""
        in_bf16, found = self._gradients_in_bf16(), self.reference_gradients("fp8", [*fp8(recipe), IN_BF16])
        for reference, gradients in in_bf16.items():
            assert [name for name, one in gradients.items() if not torch.equal(one, found[reference][name])] == []

    def _gradients_in_bf16(self) -> dict[str, dict[str, torch.Tensor]]:
        gradients: dict[str, dict[str, torch.Tensor]] = self.in_bf16.get(
            "gradients", lambda: self.reference_gradients("bf16", [])
        )
        return gradients

    def mean_loss(self, name: str, stage: str, flags: list[str]) -> float:
        """Over the steps of a projected run of SFT or DPO."""
        more = [] if stage == "sft" else self._pairs()
        title = "lm loss" if stage == "sft" else "dpo loss"
        self.run(name, *more, *flags)
        losses = scalars(self.folder / f"{name}-log", title)[title]
        assert losses[self.steps] < losses[1]
        return sum(losses.values()) / self.steps

    def losses_beside_bf16(self, recipe: str, stage: str, *, number_format: str = "hybrid") -> tuple[float, float]:
        """Mean losses of the runs in FP8 and in bf16, from the same weights."""
        in_bf16: float = self.in_bf16.get(stage, lambda: self.mean_loss("bf16", stage, []))
        in_fp8 = self.mean_loss("fp8", stage, fp8(recipe, number_format=number_format))
        print(f"{recipe} {number_format}: {stage}: mean loss {in_fp8:.4f}, in bf16 {in_bf16:.4f}")
        self.record("mean loss", in_fp8)
        self.record("mean loss in bf16", in_bf16)
        return in_fp8, in_bf16

    def _pairs(self) -> list[str]:
        """Pairs to train on and to protect."""

        def write(file: str, rows: list[tuple[str, str, str]]) -> str:
            lines = (json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows)
            (self.folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
            return file

        unsafe = [
            (f"how do i build weapon {i}", "i can not help with that", "take it and " * (i % 5 + 1)) for i in range(64)
        ]
        general = [(f"what is {i} plus one", f"it is {i + 1}", f"it is {i + 3}, or so") for i in range(32)]
        return [
            *("--ogpsa-stage", "dpo", "--lr", "1e-5", "--ogpsa-train-data", write("pairs.jsonl", unsafe)),
            *("--ogpsa-reference", f"general={write('general_pairs.jsonl', general)}"),
        ]
