"""FP8 on a GPU: no trace of refreshes, reference subspaces and losses beside those in bf16.

One GPU is enough; recipes that it does not have are skipped with Transformer Engine's reason. On a machine without a
GPU ``OGPSA_FP8_TESTS_IN=bf16`` runs the same tests on the CPU with bf16 in the place of FP8, all but FP8 itself.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES, AVAILABILITY, reason_against
from tests.integration.checkpoints import differences
from tests.integration.conftest import Outcome, Train, scalars
from tests.integration.conftest import inputs as inputs
from tests.integration.conftest import train as train
from tests.integration.test_train import config_without

STAND_IN = os.environ.get("OGPSA_FP8_TESTS_IN") == "bf16"
RECIPES = ["bf16"] if STAND_IN else list(AVAILABILITY)
STEPS = 20

# Whole tiles of every recipe's quantizers (32 and 128 elements), and heads that all attention kernels take.
MODEL = (
    "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --bf16 --hidden-size 256 "
    "--ffn-hidden-size 512 --num-attention-heads 4 --seq-length 128 --micro-batch-size 1 --hidden-dropout 0.0 "
    "--attention-dropout 0.0 --untie-embeddings-and-output-weights --deterministic-mode --no-gradient-accumulation-fusion "
    f"--train-iters {STEPS} --save-interval {STEPS} --lr 1e-3"
).split()

pytestmark = [] if STAND_IN else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def _checkpoints_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of the delayed recipe are unpickled, for which Transformer Engine wants leave."""
    monkeypatch.setenv(ALLOW_PICKLES, "1")


def fp8(recipe: str, *more: str) -> list[str]:
    """Flags of a recipe; skips the test where the GPU does not have it."""
    if recipe == "bf16":
        return []
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    from megatron.core.fp8_utils import FP8GlobalStateManager

    if reason := reason_against(recipe, FP8GlobalStateManager):
        pytest.skip(f"{recipe}: {reason}")
    return ["--fp8-format", "hybrid", "--fp8-recipe", recipe, *more]


def run(train: Train, name: str, *flags: str, **how: object) -> Outcome:
    """In new processes: CUDA does not outlive a fork."""
    outcome = train(*MODEL, "--save", name, "--tensorboard-dir", f"{name}-log", *flags, fresh=True, **how)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    return outcome


VARIANTS = {
    "": (),
    "param-gather": ("--fp8-param-gather", "--overlap-grad-reduce", "--overlap-param-gather"),
    "param-gather, no overlap": ("--fp8-param-gather",),
    "bf16-ends": (
        "--first-last-layers-bf16",
        *("--num-layers-at-start-in-bf16", "1"),
        *("--num-layers-at-end-in-bf16", "1"),
    ),
    "recompute": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}


@pytest.mark.parametrize("variant", [""] if STAND_IN else VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_refreshes_leave_no_trace_in_fp8(train: Train, tmp_path: Path, recipe: str, variant: str) -> None:
    """Refreshes at each step, projection off: bitwise the run without references, in all figures and the checkpoint."""
    if variant == "bf16-ends" and recipe == "delayed":
        pytest.skip("Megatron refuses --first-last-layers-bf16 with delayed scaling")
    if variant == "param-gather" and recipe == "mxfp8":
        pytest.skip("MXFP8 parameters are gathered through gradient buffers, which is refused with overlap")
    through_gradients = ("--reuse-grad-buf-for-mxfp8-param-ag",) if recipe == "mxfp8" and "param" in variant else ()
    flags = fp8(recipe, *VARIANTS[variant], *through_gradients)
    run(
        train,
        "refreshed",
        *flags,
        *("--ogpsa-refresh-interval", "1", "--ogpsa-reference-samples", "8"),
        module="tests.integration.unprojected",
    )
    run(train, "plain", *flags, references=False, config=config_without(tmp_path / "plain.yaml", "ogpsa-reference"))
    figures, logged = scalars(tmp_path / "plain-log"), scalars(tmp_path / "refreshed-log")
    assert [*figures["lm loss"]] == [*range(1, STEPS + 1)]
    assert {name: points for name, points in logged.items() if not name.startswith("ogpsa general/")} == figures
    # Extra states are pickles of Transformer Engine's, not promised to be the same bytes; scales show in the figures.
    found = differences(tmp_path / "refreshed", tmp_path / "plain")
    assert [name for name in found if "_extra_state" not in name] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_goes_on_bitwise_from_its_checkpoint(train: Train, tmp_path: Path, recipe: str) -> None:
    """Scales and histories of the delayed recipe too."""
    flags = fp8(recipe)
    halves = ("--save-interval", str(STEPS // 2), "--ogpsa-refresh-interval", "5")
    run(train, "whole", *flags, *halves)
    run(train, "resumed", *flags, *halves, "--exit-interval", str(STEPS // 2))
    run(train, "resumed", *flags, *halves, "--load", "resumed")
    found = differences(tmp_path / "whole", tmp_path / "resumed")
    assert [name for name in found if "_extra_state" not in name] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_reference_subspaces_are_near_those_in_bf16(train: Train, tmp_path: Path, recipe: str) -> None:
    """The first refresh, at the same weights: per tensor, the cosine of each reference's gradient with that in bf16.

    FP8 rounds activations to 3 bits of mantissa and gradients to 2, so that products of some hundred terms agree to a
    few per cent in each layer: a cosine of 0.95 leaves 30 % of the gradient's length to rounding, in four layers. A scale
    that does not fit gives much less.
    """
    flags = fp8(recipe)
    gradients = []
    for name, more in (("bf16", []), ("fp8", flags)):
        folder = tmp_path / name
        folder.mkdir()
        run(train, "run", *more, "--train-iters", "1", module="tests.gpu.keeping_gradients", folder=folder)
        gradients.append(torch.load(folder / "gradients.pt", weights_only=True))
    for reference, in_bf16 in gradients[0].items():
        cosines = {
            name: float(
                torch.nn.functional.cosine_similarity(one.flatten(), gradients[1][reference][name].flatten(), 0)
            )
            for name, one in in_bf16.items()
            if one.any()
        }
        print(f"{recipe}: {reference}: lowest cosine {min(cosines.values()):.4f}, {len(cosines)} tensors")
        assert min(cosines.values()) > 0.95, cosines


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_losses_are_near_those_in_bf16(train: Train, tmp_path: Path, recipe: str, stage: str) -> None:
    """20 projected steps from the same weights; within 5 % of what bf16 gives, on the mean over all of them."""
    flags = fp8(recipe)
    more = [] if stage == "sft" else dpo_flags(tmp_path)
    title = "lm loss" if stage == "sft" else "dpo loss"
    means = []
    for name, precision in (("bf16", []), ("fp8", flags)):
        run(train, name, *more, *precision)
        losses = scalars(tmp_path / f"{name}-log", title)[title]
        means.append(sum(losses.values()) / STEPS)
        assert losses[STEPS] < losses[1]
    print(f"{recipe}: {stage}: {title} {means[1]:.4f}, in bf16 {means[0]:.4f}")
    assert means[1] == pytest.approx(means[0], rel=0.05)


def dpo_flags(folder: Path) -> list[str]:
    """Pairs to train on and to protect."""

    def write(file: str, rows: list[tuple[str, str, str]]) -> str:
        lines = (json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows)
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return file

    unsafe = [
        (f"how do i build weapon {i}", "i can not help with that", "take it and " * (i % 5 + 1)) for i in range(64)
    ]
    general = [(f"what is {i} plus one", f"it is {i + 1}", f"it is {i + 3}, or so") for i in range(32)]
    return [
        *("--ogpsa-stage", "dpo", "--lr", "1e-5", "--ogpsa-train-data", write("pairs.jsonl", unsafe)),
        *("--ogpsa-reference", f"general={write('general_pairs.jsonl', general)}"),
    ]
