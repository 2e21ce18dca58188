"""FP8 on a GPU: no trace of refreshes, resume, reference gradients and losses beside those in bf16.

One GPU is enough; recipes that it does not have are skipped with Transformer Engine's reason. The same runs, of a smaller
model, over an emulation of Transformer Engine's kernels: tests/transformer_engine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ogpsa.precision.fp8_support import ALLOW_PICKLES, AVAILABILITY, reason_against
from tests.integration.conftest import Train
from tests.integration.conftest import inputs as inputs
from tests.integration.conftest import train as train
from tests.precision.fp8_training import IN_E4M3, VARIANTS, Fp8Training, Shared, fp8, refusal_of

STEPS = 20
FEW_STEPS = 6
"""Of runs that are to be bitwise the same: each has a refresh before it, or every second one."""
MODEL = ("--hidden-size", "256", "--ffn-hidden-size", "512", "--num-attention-heads", "4")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _checkpoints_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of the delayed recipe are unpickled, for which Transformer Engine wants leave."""
    monkeypatch.setenv(ALLOW_PICKLES, "1")


@pytest.fixture(autouse=True)
def _compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each run that compiles a fused function starts a process for each core, which is a lot with runs side by side."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(scope="session")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    own = tmp_path_factory.getbasetemp()
    of_all = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return Shared(of_all)


@pytest.fixture
def training(
    train: Train, tmp_path: Path, recipe: str, in_bf16: Shared, record_property: Callable[[str, object], None]
) -> Fp8Training:
    """Skips the test where the GPU does not have the recipe."""
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    from megatron.core.fp8_utils import FP8GlobalStateManager

    if reason := reason_against(recipe, FP8GlobalStateManager):
        pytest.skip(f"{recipe}: {reason}")
    return Fp8Training(train, tmp_path, MODEL, STEPS, fresh=True, in_bf16=in_bf16, record=record_property)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", AVAILABILITY)
def test_refreshes_leave_no_trace(training: Fp8Training, recipe: str, variant: str) -> None:
    if reason := refusal_of(recipe, variant):
        pytest.skip(reason)
    replace(training, steps=FEW_STEPS).assert_no_trace(fp8(recipe, variant))


@pytest.mark.parametrize("recipe", AVAILABILITY)
def test_a_run_goes_on_bitwise_from_its_checkpoint(training: Fp8Training, recipe: str) -> None:
    replace(training, steps=FEW_STEPS).assert_resumes(fp8(recipe))


@pytest.mark.parametrize("recipe", AVAILABILITY)
def test_reference_subspaces_are_near_those_in_bf16(training: Fp8Training, recipe: str) -> None:
    """The first refresh, at the same weights: per tensor, the cosine of each reference's gradient with that in bf16.

    FP8 rounds activations to 3 bits of mantissa and gradients to 2, so that products of some hundred terms agree to a
    few per cent in each layer: a cosine of 0.95 leaves 30 % of the gradient's length to rounding, in four layers. A scale
    that does not fit gives much less.
    """
    assert training.lowest_cosine(recipe) > 0.95


@pytest.mark.parametrize("recipe", AVAILABILITY)
def test_references_without_fp8_are_those_of_a_run_in_bf16(training: Fp8Training, recipe: str) -> None:
    training.assert_references_without_fp8(recipe)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("recipe", AVAILABILITY)
def test_losses_are_near_those_in_bf16(training: Fp8Training, recipe: str, stage: str) -> None:
    """20 projected steps from the same weights; within 5 % of what bf16 gives, on the mean over all of them."""
    in_fp8, in_bf16 = training.losses_beside_bf16(recipe, stage)
    assert in_fp8 == pytest.approx(in_bf16, rel=0.05)


@pytest.mark.parametrize("recipe", IN_E4M3)
def test_in_e4m3_refreshes_leave_no_trace(training: Fp8Training, recipe: str) -> None:
    replace(training, steps=FEW_STEPS).assert_no_trace(fp8(recipe, number_format="e4m3"))


@pytest.mark.parametrize("recipe", IN_E4M3)
def test_losses_in_e4m3_are_near_those_in_bf16(training: Fp8Training, recipe: str) -> None:
    """As in the hybrid format, whose figures it is not among."""
    in_e4m3, in_bf16 = training.losses_beside_bf16(recipe, "sft", number_format="e4m3")
    assert in_e4m3 == pytest.approx(in_bf16, rel=0.05)
