"""What is not finite on one rank, through the training loop: all ranks skip or stop together, and say why.

(That no weight changes, in every layout and on every rank: tests/core/test_contract.py.)
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_ogpsa.precision.loss_scale import FIRST_SCALE
from tests.integration.conftest import Train, scalars

LAYOUTS = {
    "tp2": "--nproc-per-node 2 --pipeline-model-parallel-size 1",
    "pp2": "--nproc-per-node 2 --tensor-model-parallel-size 1",
    "dp2": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
}
EVERY_STEP = ("--ogpsa-refresh-interval", "1", "--save-interval", "100")


@pytest.mark.parametrize(
    ("layout", "plant", "flags", "expected"),
    [
        (
            "tp2",
            "reference 1 2",
            (),
            r"the gradient of reference general is not finite in \S+, in 3 refreshes in a row",
        ),
        ("dp2", "reference 0 1", (), r"the gradient of reference general is not finite in \S+ at the first refresh"),
        (
            "pp2",
            "gradient 0 2",
            ("--no-check-for-nan-in-loss-and-grad", "--ogpsa-max-bad-steps", "2"),
            "the gradient was not finite in 2 steps in a row, up to step 3: lower --lr",
        ),
    ],
)
def test_the_run_ends_on_all_ranks_with_the_cause(
    train: Train, monkeypatch: pytest.MonkeyPatch, layout: str, plant: str, flags: tuple[str, ...], expected: str
) -> None:
    monkeypatch.setenv("PLANT", plant)
    outcome = train(
        *LAYOUTS[layout].split(), *EVERY_STEP, *flags, "--train-iters", "20", module="tests.integration.planting"
    )
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1, outcome.error_lines
    assert re.search(expected, outcome.error_lines[0])
    assert "Traceback" not in outcome.output


def test_layers_of_one_stage_that_are_refused_end_all_stages(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANT", "refusal 1 1")
    outcome = train(*LAYOUTS["pp2"].split(), module="tests.integration.planting")
    assert outcome.exit_code == 2, outcome.output[-3000:]
    (told,) = outcome.error_lines
    assert "--a-layer: it is of another kind; leave it out (on rank 1)" in told


@pytest.mark.parametrize(("layout", "rank"), [("pp2", 1), ("dp2", 1)])
def test_a_basis_that_is_not_finite_costs_one_step_and_a_refresh(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, rank: int
) -> None:
    monkeypatch.setenv("PLANT", f"basis {rank} 3")
    outcome = train(
        *LAYOUTS[layout].split(),
        *("--ogpsa-refresh-interval", "100", "--tensorboard-dir", "log"),
        module="tests.integration.planting",
    )
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert outcome.output.count("step skipped on all ranks: the basis or a parameter is not finite") == 1
    assert re.search(r"iteration +3/ .* number of skipped iterations: +1 ", outcome.output)
    assert re.search(r"OGPSA refresh at step 3:", outcome.output)
    assert scalars(tmp_path / "log", "ogpsa skipped steps")["ogpsa skipped steps"][6] == 1.0


def test_in_fp16_references_do_not_wait_for_the_loss_scale_of_training(train: Train, tmp_path: Path) -> None:
    """Megatron skips steps until its scale fits; the first refresh comes before them, and has a basis for the first step."""
    steps = ("--train-iters", "9", "--save-interval", "9", "--initial-loss-scale", str(2**14), "--hysteresis", "1")
    outcome = train(*LAYOUTS["dp2"].split(), "--fp16", *steps, "--save", "run", "--tensorboard-dir", "log")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "not finite" not in outcome.output
    assert "OGPSA refresh at step 0: general loss" in outcome.output
    figures = scalars(tmp_path / "log", "loss-scale", "ogpsa bad refreshes")
    assert figures["loss-scale"][1] < 2**14  # the first step was skipped
    assert set(figures["ogpsa bad refreshes"].values()) == {0.0}
    state = json.loads((tmp_path / "run/iter_0000009/ogpsa.json").read_text(encoding="utf-8"))
    assert state["reference loss scale"] <= FIRST_SCALE
