"""A checkpoint of one layout goes on in others, and back: the optimizer's state is saved fully reshardable."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import Train, scalars

# Megatron pads the vocabulary to a multiple of 128 times TP: weights are to have one shape in all layouts.
LAYOUTS = {
    "tp2-pp2": "--make-vocab-size-divisible-by 64",
    "dp2": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
    "pp2-dp2": "--tensor-model-parallel-size 1",
}
FIGURES = ("lm loss", "grad-norm", "ogpsa removed length")
STILL = ("--hidden-dropout", "0", "--attention-dropout", "0", "--train-iters", "6", "--save-interval", "2")
RESHARDABLE = ("--dist-ckpt-optim-fully-reshardable", "--ckpt-fully-parallel-load")


def run(train: Train, layout: str, name: str, *flags: str) -> dict[str, dict[int, float]]:
    """Figures of the run ``name``, which goes on where it is."""
    log = f"{name}-{layout}-log"
    given = ("--save", name, "--load", name, "--tensorboard-dir", log, "--ogpsa-refresh-interval", "3")
    outcome = train(*LAYOUTS[layout].split(), *STILL, *given, *flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    return scalars(outcome.folder / log, *FIGURES)


def test_a_run_goes_on_in_another_layout_and_back(train: Train, tmp_path: Path) -> None:
    """Steps 3 and 4 in another layout than 1 and 2, and then 5 and 6 in the first one again.

    Tolerance: fp32 sums in another order, as in runs of 20 steps from the same weights (test_dpo.py): 2e-5.
    """
    whole = run(train, "tp2-pp2", "whole", *RESHARDABLE)
    for layout in ("dp2", "pp2-dp2"):
        shutil.copytree(tmp_path / "whole", tmp_path / layout, ignore=shutil.ignore_patterns("iter_000000[46]"))
        (tmp_path / layout / "latest_checkpointed_iteration.txt").write_text("2", encoding="utf-8")
        other = run(train, layout, layout, "--exit-interval", "4", *RESHARDABLE)
        back = run(train, "tp2-pp2", layout, *RESHARDABLE)
        for name in FIGURES:
            assert [*other[name], *back[name]] == [3, 4, 5, 6]
            seen = other[name] | back[name]
            assert seen == pytest.approx({step: whole[name][step] for step in seen}, rel=2e-5, abs=1e-6), (layout, name)


def test_state_that_cannot_be_resharded_is_refused_in_one_line(train: Train, tmp_path: Path) -> None:
    run(train, "pp2-dp2", "run", "--train-iters", "2")
    outcome = train(*LAYOUTS["dp2"].split(), *STILL, "--save", "run", "--load", "run")
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1
    assert "--load run: Megatron cannot load this checkpoint into this run: (TP, PP) mismatch" in outcome.error_lines[0]
    assert "save with --dist-ckpt-optim-fully-reshardable" in outcome.error_lines[0]
