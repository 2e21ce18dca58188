"""Fine-tuning with sequences split over context-parallel ranks, through Megatron's loop."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import Train, scalars

FIGURES = ("lm loss", "grad-norm", "ogpsa removed")
# fp32 sums in another order, 1e-7 a step, that Adam carries on through 8 steps at a large learning rate.
TOLERANCE = 2e-5


def test_split_sequences_train_as_whole_ones(train: Train, tmp_path: Path) -> None:
    """CP2 with projection against one process, step by step: data, positions, labels, masks and references are split."""
    flags = "--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --attention-dropout 0 --hidden-dropout 0 "
    flags += "--train-iters 8 --save-interval 100 --ogpsa-space gradient "
    flags += "--ogpsa-mode orthogonal"
    for name, layout, module in (
        ("whole", "--nproc-per-node 1", "megatron_ogpsa.cli.main"),
        ("split", "--nproc-per-node 2 --context-parallel-size 2", "tests.integration.split_sequences"),
    ):
        logs = ("--tensorboard-dir", name, "--save", f"{name}-checkpoints")
        outcome = train(*layout.split(), *flags.split(), *logs, module=module)
        assert outcome.exit_code == 0, outcome.output[-3000:]
    whole, split = (scalars(tmp_path / name, *FIGURES) for name in ("whole", "split"))
    for name in FIGURES:
        assert [*split[name]] == [*range(1, 9)]
        assert split[name] == pytest.approx(whole[name], rel=TOLERANCE, abs=TOLERANCE), name
    assert all(amount > 0 for amount in split["ogpsa removed"].values())
