"""FP8 over the emulated kernels: what tests/gpu holds a GPU to, on a smaller model.

Some recipes with some variants; all of them, in 5 minutes, with ``OGPSA_TEST_ALL_FP8=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES, AVAILABILITY
from tests.integration.checkpoints import checkpoint_tensors
from tests.integration.conftest import Train
from tests.precision.fp8_training import IN_BF16, IN_E4M3, VARIANTS, Fp8Training, Shared, fp8, refusal_of

ALL = os.environ.get("OGPSA_TEST_ALL_FP8") == "1"

MODEL = (
    "--transformer-impl transformer_engine --num-layers 3 --hidden-size 128 --ffn-hidden-size 256 --num-attention-heads 2 "
    "--global-batch-size 2"
).split()

MAIN_PARAMETER = "optimizer.state.param."

NO_TRACE = [("delayed", "recompute"), ("mxfp8", "param-gather, no overlap")]
if ALL:
    NO_TRACE = [(r, v) for r in AVAILABILITY for v in VARIANTS if refusal_of(r, v) is None]


@pytest.fixture(autouse=True)
def _checkpoints_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of the delayed recipe are unpickled, for which Transformer Engine wants leave."""
    monkeypatch.setenv(ALLOW_PICKLES, "1")


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("bf16"))


@pytest.fixture
def training(
    recipe: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    in_bf16: Shared,
    record_property: Callable[[str, object], None],
) -> Fp8Training:
    train: Train = request.getfixturevalue("train_te_blackwell" if recipe == "mxfp8" else "train_te")
    return Fp8Training(train, tmp_path, tuple(MODEL), steps=4, fresh=False, in_bf16=in_bf16, record=record_property)


@pytest.mark.parametrize(("recipe", "variant"), NO_TRACE)
def test_refreshes_leave_no_trace(training: Fp8Training, recipe: str, variant: str) -> None:
    training.assert_no_trace(fp8(recipe, variant))


@pytest.mark.parametrize("recipe", AVAILABILITY if ALL else ["delayed"])
def test_a_run_goes_on_bitwise_from_its_checkpoint(training: Fp8Training, recipe: str) -> None:
    """Of the recipes only ``delayed`` has something to go on with."""
    training.assert_resumes(fp8(recipe))


@pytest.mark.parametrize("recipe", AVAILABILITY if ALL else ["delayed", "blockwise"])
def test_reference_subspaces_are_near_those_in_bf16(training: Fp8Training, recipe: str) -> None:
    """Measured 0.996 to 0.997 for the worst of 21 parameters; tests/gpu says what to expect."""
    assert training.lowest_cosine(recipe) > 0.95


@pytest.mark.parametrize("recipe", AVAILABILITY if ALL else ["tensorwise"])
def test_references_without_fp8_are_those_of_a_run_in_bf16(training: Fp8Training, recipe: str) -> None:
    training.assert_references_without_fp8(recipe)


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [(r, s) for r in AVAILABILITY for s in ("sft", "dpo")] if ALL else [("delayed", "dpo")],
)
def test_losses_are_near_those_in_bf16(training: Fp8Training, recipe: str, stage: str) -> None:
    in_fp8, in_bf16 = training.losses_beside_bf16(recipe, stage)
    assert in_fp8 == pytest.approx(in_bf16, rel=0.05)


@pytest.mark.parametrize("recipe", IN_E4M3)
@pytest.mark.parametrize("more", [(), (IN_BF16,)], ids=["", "references in bf16"])
def test_in_e4m3_refreshes_leave_no_trace(training: Fp8Training, recipe: str, more: tuple[str, ...]) -> None:
    """References in bf16 are followed by steps in the format that was asked for."""
    training.assert_no_trace([*fp8(recipe, number_format="e4m3"), *more])


@pytest.mark.parametrize("recipe", IN_E4M3)
def test_losses_in_e4m3_are_near_those_in_bf16(training: Fp8Training, recipe: str) -> None:
    """Gradients have three bits of mantissa then: other losses than in the hybrid format, from the same weights."""
    in_e4m3, in_bf16 = training.losses_beside_bf16(recipe, "sft", number_format="e4m3")
    assert in_e4m3 == pytest.approx(in_bf16, rel=0.05)
    assert in_e4m3 != training.mean_loss("hybrid", "sft", fp8(recipe))


@pytest.mark.parametrize(
    "layout",
    [
        "--nproc-per-node 2 --tensor-model-parallel-size 2",
        "--nproc-per-node 2 --expert-model-parallel-size 2 --num-experts 4 --moe-router-topk 2 --moe-grouped-gemm "
        "--moe-token-dispatcher-type allgather --moe-ffn-hidden-size 128",
    ],
    ids=["tp2", "ep2"],
)
@pytest.mark.parametrize("recipe", ["tensorwise"])
def test_a_loaded_model_begins_from_weights_before_rounding(training: Fp8Training, recipe: str, layout: str) -> None:
    """Of ``--fp8-param-gather``; a step without a learning rate leaves the fp32 main parameters as they were loaded."""
    one_step = replace(training, steps=1, model=(*training.model, *layout.split()))
    one_step.run("start")
    still = ("--lr", "1e-30", "--weight-decay", "0", "--dist-ckpt-optim-fully-reshardable")
    one_step.run("tuned", *fp8(recipe, "param-gather, no overlap"), *still, "--pretrained-checkpoint", "start")
    loaded, tuned = checkpoint_tensors(training.folder / "start"), checkpoint_tensors(training.folder / "tuned")
    main = {name: value for name, value in tuned.items() if name.startswith(MAIN_PARAMETER)}
    assert main
    for name, value in main.items():
        assert torch.equal(value, loaded[name.removeprefix(MAIN_PARAMETER)].float()), name
