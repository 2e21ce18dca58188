"""Fine-tuning through Megatron's loop: resumed runs, no trace of refreshes, and what the log says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.integration.conftest import CONFIG, GENERAL, Train, scalars

FIGURES = ("lm loss", "grad-norm", "ogpsa rank")

LAYOUTS = {
    "tp2-pp2": "",
    "dp2": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
    "dp2-update-space": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
    "--ogpsa-space update",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_undisturbed_one(train: Train, tmp_path: Path, layout: str) -> None:
    """With dropout, whose random states are part of the checkpoint and not of the refresh."""
    flags = [*LAYOUTS[layout].split(), "--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    if GENERAL.exists():
        flags += ["--ogpsa-reference", f"general={GENERAL}"]
    removed = "ogpsa removed length" if "--ogpsa-space" in flags else "ogpsa removed"
    whole = train(*flags, "--save", "whole", "--tensorboard-dir", "whole-log")
    assert whole.exit_code == 0, whole.output[-3000:]
    assert re.search(rf"iteration +6/ +6 .*{removed}: .*ogpsa rank: 1\.0.*ogpsa refresh \(ms\): ", whole.output)

    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/iter_0000006")
    (tmp_path / "resumed/latest_checkpointed_iteration.txt").write_text("3", encoding="utf-8")
    again = train(*flags, "--save", "resumed", "--load", "resumed", "--tensorboard-dir", "resumed-log")
    assert again.exit_code == 0, again.output[-3000:]

    figures = (*FIGURES, removed)
    undisturbed, resumed = scalars(tmp_path / "whole-log", *figures), scalars(tmp_path / "resumed-log", *figures)
    for name in figures:
        assert [*resumed[name]] == [4, 5, 6]
        assert {step: undisturbed[name][step] for step in (4, 5, 6)} == resumed[name], name
    assert all(0 < amount < 1 for amount in undisturbed[removed].values())


NO_TRACE = {
    "tp2-pp2": "",
    "dp2-overlap": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 "
    "--overlap-grad-reduce --overlap-param-gather",
    "interleaved": "--nproc-per-node 2 --tensor-model-parallel-size 1 --num-layers-per-virtual-pipeline-stage 1",
}


@pytest.mark.parametrize("layout", NO_TRACE)
def test_a_refresh_leaves_no_trace(train: Train, tmp_path: Path, layout: str) -> None:
    """Refreshes at each step, projection off: bitwise the run without references, with dropout and the rerun machine."""
    flags = [*NO_TRACE[layout].split(), "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--train-iters", "8"]
    refreshed = train(
        *flags,
        *("--ogpsa-refresh-interval", "1", "--save", "a", "--tensorboard-dir", "refreshed"),
        module="tests.integration.unprojected",
    )
    assert refreshed.exit_code == 0, refreshed.output[-3000:]
    assert "OGPSA: references general" in refreshed.output
    plain_config = tmp_path / "plain.yaml"
    text = CONFIG.read_text(encoding="utf-8")
    plain_config.write_text(re.sub(r"ogpsa-reference:.*?\n.*?\n", "", text), encoding="utf-8")
    plain = train(*flags, "--save", "b", "--tensorboard-dir", "plain", config=plain_config, references=False)
    assert plain.exit_code == 0, plain.output[-3000:]
    assert "OGPSA" not in plain.output
    names = ("lm loss", "grad-norm")
    assert scalars(tmp_path / "refreshed", *names) == scalars(tmp_path / "plain", *names)
