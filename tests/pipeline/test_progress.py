"""What a pipeline makes of the folders that it finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ogpsa.cli.train import run_in_order
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import Stage
from megatron_ogpsa.pipeline.progress import (
    RECORD_FILE,
    TRACKER_FILE,
    begin,
    changed_settings,
    finish,
    state_of,
)
from tests.pipeline.test_plan import TEXT, stages_of

Stages = Callable[..., tuple[Stage, Stage]]


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    monkeypatch.chdir(tmp_path)

    def plan(text: str = TEXT, *overrides: str) -> tuple[Stage, Stage]:
        sft, dpo = stages_of(tmp_path, text, *overrides)
        return sft, dpo

    return plan


def checkpoint(stage: Stage) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    (stage.folder / TRACKER_FILE).write_text("6", encoding="utf-8")


def run(stage: Stage) -> None:
    begin(stage)
    checkpoint(stage)
    finish(stage)


def test_a_stage_is_new_then_begun_then_finished(stages: Stages) -> None:
    sft, dpo = stages()
    assert state_of(sft) == "new"
    begin(sft)
    assert state_of(sft) == "new"  # stopped before its first checkpoint: it starts again
    checkpoint(sft)
    assert state_of(sft) == "begun"
    finish(sft)
    assert state_of(sft) == "finished"
    assert state_of(dpo) == "new"
    run(dpo)
    assert [state_of(stage) for stage in stages()] == ["finished", "finished"]


def test_only_changed_flags_are_named(stages: Stages) -> None:
    run(stages()[0])
    assert changed_settings(stages()[0]) == []
    assert changed_settings(stages(TEXT.replace("lr: 2.0e-5", "lr: 4.0e-5"))[0]) == ["lr"]
    assert changed_settings(stages(TEXT, "--train-iters", "7", "--bf16")[0]) == ["bf16", "train-iters"]
    assert changed_settings(stages(TEXT.replace("    lr: 2.0e-5", "    seed: 3"))[0]) == ["lr", "seed"]


def test_a_stage_whose_start_was_trained_again_is_not_gone_on_with(stages: Stages) -> None:
    sft, dpo = stages()
    run(sft)
    begin(dpo)
    checkpoint(dpo)
    shutil.rmtree(sft.folder)
    with pytest.raises(UserError, match="began with an earlier result of the stage sft: delete it"):
        state_of(dpo)
    run(sft)
    with pytest.raises(UserError, match="began with an earlier result of the stage sft: delete it"):
        state_of(dpo)
    shutil.rmtree(dpo.folder)
    assert state_of(dpo) == "new"


def test_what_does_not_fit_is_an_error(stages: Stages) -> None:
    sft, dpo = stages()
    with pytest.raises(UserError, match="begins with the stage sft, which is not finished"):
        begin(dpo)
    checkpoint(sft)
    with pytest.raises(UserError, match="holds checkpoints that this pipeline has not made"):
        state_of(sft)
    run_folder = sft.folder
    (run_folder / TRACKER_FILE).unlink()
    run(sft)
    (run_folder / TRACKER_FILE).unlink()
    with pytest.raises(UserError, match="its checkpoint is gone: restore it, or delete the folder"):
        state_of(sft)
    (run_folder / RECORD_FILE).write_text('{"settings": {', encoding="utf-8")
    with pytest.raises(UserError, match=r"stage\.json cannot be read"):
        state_of(sft)
    (run_folder / RECORD_FILE).write_text(json.dumps(["settings"]), encoding="utf-8")
    with pytest.raises(UserError, match=r"stage\.json is not a JSON object: restore it, or delete .*out/sft"):
        state_of(sft)


def test_stages_run_in_order_and_stop_where_one_stops(stages: Stages) -> None:
    def ran(results: dict[str, str], codes: dict[str, int], told: str = "") -> tuple[int, list[str], str]:
        order: list[str] = []
        said: list[str] = []

        def run_stage(stage: Stage) -> int:
            order.append(stage.name)
            results[stage.name] = "finished" if codes.get(stage.name) is None else "begun"
            return codes.get(stage.name) or 0

        code = run_in_order(
            stages(),
            look=lambda stage: (results[stage.name], []),  # type: ignore[return-value]
            run_stage=run_stage,
            is_told=lambda: told in order,
            say=said.append,
        )
        return code, order, " ".join(said)

    assert ran({"sft": "new", "dpo": "new"}, {})[:2] == (0, ["sft", "dpo"])
    code, order, said = ran({"sft": "finished", "dpo": "begun"}, {})
    assert (code, order) == (0, ["dpo"])
    assert "stage sft (out/sft) is finished: skipped" in said
    assert "stage dpo (out/dpo) goes on" in said
    assert ran({"sft": "new", "dpo": "new"}, {"sft": 7})[:2] == (7, ["sft"])
    code, order, said = ran({"sft": "new", "dpo": "new"}, {"sft": 0})  # told to save and exit
    assert (code, order) == (0, ["sft"])
    assert "has stopped before its last step: run the same command to go on" in said
    code, order, said = ran({"sft": "new", "dpo": "new"}, {}, told="sft")  # too late for this stage
    assert (code, order) == (0, ["sft"])
    assert "stage dpo (out/dpo) is not started, because a signal has come: run the same command to go on" in said
    assert ran({"sft": "new", "dpo": "new"}, {}, told="dpo")[1] == ["sft", "dpo"]
