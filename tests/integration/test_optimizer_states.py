"""Checkpoints of optimizers that have no state yet, and of SGD: runs go on from them as if nothing had been."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_ogpsa.integration.runtime.optimizer_states import _with_states
from tests.integration.checkpoints import differences
from tests.integration.conftest import Train
from tests.integration.test_train import DP2, config_without

STEPS, SAVED = 10, 3
FP16 = f"{DP2} --fp16 --initial-loss-scale {2**16} --hysteresis 1"
"""The first six steps overflow, so that the first checkpoint is of an optimizer that has not stepped."""

RUNS = {
    "fp16": (FP16, True),
    "fp16-fully-reshardable": (f"{FP16} --dist-ckpt-optim-fully-reshardable --ckpt-fully-parallel-load", True),
    "fp16-plain": (FP16, False),
    "fp32-plain-sgd": (f"{DP2} --optimizer sgd", False),
}
"""Flags, and whether the optimizer is the distributed one."""


def test_states_of_other_optimizers_are_left_to_them() -> None:
    """Runs without references may have Lion, say, whose state is another than Adam's."""
    for name, is_made in (("adam", True), ("lion", False), ("muon", False)):
        inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        config = SimpleNamespace(optimizer=name, use_precision_aware_optimizer=False)
        megatrons = SimpleNamespace(optimizer=inner, config=config, is_stub_optimizer=False)
        _with_states(lambda *_: None)(megatrons)
        assert bool(inner.state) == is_made


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_as_the_undisturbed_one(train: Train, tmp_path: Path, name: str) -> None:
    """And refreshes by the steps that were taken: skipped ones change no weight, so that no basis goes stale by them."""
    flags, is_distributed = RUNS[name]
    config = config_without(tmp_path / "run.yaml", *(() if is_distributed else ("use-distributed-optimizer",)))
    steps = ("--train-iters", str(STEPS), "--save-interval", str(SAVED), "--ogpsa-refresh-interval", "12")
    whole = train(*flags.split(), *steps, "--save", "whole", config=config)
    assert whole.exit_code == 0, whole.output[-3000:]
    skipped = len(re.findall(r"number of skipped iterations: +[1-9]", whole.output))
    assert SAVED < skipped < STEPS - SAVED if "fp16" in name else skipped == 0, skipped

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", ignore=shutil.ignore_patterns("iter_000000[69]", "*10"))
    (tmp_path / "resumed/latest_checkpointed_iteration.txt").write_text(str(SAVED), encoding="utf-8")
    resumed = train(*flags.split(), *steps, "--save", "resumed", "--load", "resumed", config=config)
    assert resumed.exit_code == 0, resumed.output[-3000:]
    assert differences(tmp_path / "resumed", tmp_path / "whole") == []

    early = {step + skipped for step in (1, 2, 4, 6) if step + skipped < STEPS}
    expected = sorted(early | {*range(0, STEPS, SAVED)})
    refreshed = [int(step) for step in re.findall(r"OGPSA refresh at step (\d+):", whole.output)]
    assert refreshed == expected
    assert [int(step) for step in re.findall(r"OGPSA refresh at step (\d+):", resumed.output)] == [
        step for step in expected if step >= SAVED
    ]
