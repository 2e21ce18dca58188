"""What is compared differs in the projection alone; what was scored is not run again; the report's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.console.commands import Command, run_commands
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.laptop.jobs import Job, chatting_steps
from megatron_ogpsa.laptop.recipe import Recipe, Sizes, keep_model
from megatron_ogpsa.laptop.report import markdown_tables, read_curve, terminal_table, write_report
from megatron_ogpsa.study.report import read_json
from megatron_ogpsa.study.settings import PLAIN, SETTINGS
from megatron_ogpsa.study.tradeoff import Curve, at_safety

NAMES = (PLAIN, "gradient-tensor", "update-tensor")
SIZES = Sizes(sft_steps=4, dpo_steps=3, save_interval=2, refresh_interval=2, parts=2)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    rows = [{"prompt": f"what is {number} plus one", "response": f"it is {number + 1}"} for number in range(40)]
    rows.insert(1, {"prompt": "long", "response": "word " * 200})
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = Recipe(out=tmp_path / "out", seed=1, general=str(general), num_ranks=2, sizes=SIZES)
    made.write_data()
    return made


def flags_of(config: Path, stage: str) -> Mapping[str, Any]:
    return vars(parse_flags(ConfigFile.read(config).stage(stage).as_flags(build_parser(), [])))


def test_settings_differ_in_the_projection_alone(recipe: Recipe) -> None:
    (recipe.start).mkdir(parents=True)
    (recipe.start / "model.yaml").write_text("num-layers: 2\n", encoding="utf-8")
    for stage in ("sft", "dpo"):
        plain, *others = (flags_of(recipe.write_config(name, SETTINGS[name]), stage) for name in NAMES)
        assert not plain["ogpsa_reference"]
        for flags in others:
            assert flags["ogpsa_reference"]
            differ = {key for key in plain if plain[key] != flags[key]}
            assert {key for key in differ if not key.startswith("ogpsa_")} == {"save"}
            assert not differ & {"ogpsa_train_data", "ogpsa_stage", "ogpsa_packing"}
            assert flags["save_interval"] == flags["ogpsa_refresh_interval"]  # checkpoints add no refresh
            assert flags["ogpsa_rank_per_reference"] == 2


def test_an_interval_that_adapts_is_asked_of_protected_runs(recipe: Recipe) -> None:
    adapting = replace(recipe, sizes=replace(recipe.sizes, adaptive_interval=0.5))
    for name in NAMES:
        kept = adapting.config(name, SETTINGS[name]).get("ogpsa-adaptive-interval")
        assert kept == (0.5 if SETTINGS[name].projected else None)
        assert "ogpsa-adaptive-interval" not in recipe.config(name, SETTINGS[name])


def test_long_conversations_are_left_out_and_protected_ones_are_not_scored(recipe: Recipe) -> None:
    protected, scored = (
        (recipe.data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in ("references", "general")
    )
    assert (len(protected), len(scored)) == (8, 32)
    assert not set(protected) & set(scored)
    assert not any("long" in row for row in (*protected, *scored))


def test_other_data_are_not_mixed_with_what_was_scored(recipe: Recipe) -> None:
    recipe.write_data()  # the same again
    with pytest.raises(UserError, match=r"references.jsonl is of a run with other data"):
        replace(recipe, sizes=replace(SIZES, references=4)).write_data()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "chat_template.jinja", "tokenizer.model"])
def test_a_changed_file_of_the_model_makes_it_another(tmp_path: Path, name: str) -> None:
    """What is converted already has the old one, and so have scores."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text("old", encoding="utf-8")
    keep_model(tmp_path / "out", tmp_path / "model")
    keep_model(tmp_path / "out", tmp_path / "model")
    (tmp_path / "model" / name).write_text("new", encoding="utf-8")
    with pytest.raises(UserError, match=r"model.json is of a run from another model"):
        keep_model(tmp_path / "out", tmp_path / "model")


def scores(path: Path, *points: tuple[float, float, float]) -> None:
    """As ``megatron-ogpsa evaluate`` writes them, of (unsafe refused, benign refused, general loss)."""
    found = [
        {
            "data": {"general": {"loss": loss}},
            "prompts": {"unsafe": {"refused": {"value": unsafe}}, "benign": {"refused": {"value": benign}}},
        }
        for unsafe, benign, loss in points
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"checkpoints": found}), encoding="utf-8")


def test_what_was_scored_with_the_same_file_is_not_run_again(recipe: Recipe) -> None:
    job = Job.of(recipe, PLAIN, SETTINGS[PLAIN])
    assert [step.is_done for step in job.steps()] == [False] * 3
    scores(job.result, (0.5, 0.1, 1.7))
    job.trained_with.write_bytes(job.config.read_bytes())
    assert [step.is_done for step in Job.of(recipe, PLAIN, SETTINGS[PLAIN]).steps()] == [True] * 3
    left = recipe.training(PLAIN) / "sft/iter_0000002"  # by a run that was stopped after the scores
    left.mkdir(parents=True)
    assert [step.is_done for step in Job.of(recipe, PLAIN, SETTINGS[PLAIN]).steps()] == [True, True, False]
    job.trained_with.write_text("seed: 2\n", encoding="utf-8")
    assert not Job.of(recipe, PLAIN, SETTINGS[PLAIN]).is_done
    assert not job.result.exists()


def test_answers_of_a_chat_that_failed_or_of_other_models_are_asked_for_again(recipe: Recipe, tmp_path: Path) -> None:
    log = tmp_path / "chat.log"

    def chat(*names: str) -> Command:
        jobs = [replace(Job.of(recipe, name, SETTINGS[name]), is_done=True) for name in names]
        return list(chatting_steps(jobs, tmp_path / "model", log))[-1]

    log.write_text("Traceback", encoding="utf-8")  # of one that ended before its time
    assert not chat(PLAIN).is_done
    run_commands([replace(chat(PLAIN), argv=["true"])])
    assert chat(PLAIN).is_done
    assert not chat(PLAIN, "update-tensor").is_done
    assert not chat(PLAIN).is_done  # that chat may have begun, and has then overwritten the log


def test_every_checkpoint_but_the_last_is_scored_by_number_and_removed(recipe: Recipe) -> None:
    assert list(SIZES.steps()) == [("sft", 2), ("sft", 4), ("dpo", 2), ("dpo", 3)]
    train, score, tidy = Job.of(recipe, PLAIN, SETTINGS[PLAIN]).steps()
    folder = recipe.training(PLAIN)
    given = [score.argv[i + 1] for i, word in enumerate(score.argv) if word in ("--compare", "--load")]
    assert given == [f"{folder}/dpo", f"{folder}/sft@2", f"{folder}/sft@4", f"{folder}/dpo@2"]
    config = str(folder.with_suffix(".yaml"))
    assert train.argv[-4:] == ["train", "--nnodes", "1", config]  # in an allocation of two it would wait for the other
    assert score.argv[3:7] == ["evaluate", config, "--nnodes", "1"]
    assert tidy.argv[:2] == ["rm", "-rf"]
    assert tidy.argv[2:] == [
        f"{folder}/sft/iter_0000002",
        f"{folder}/sft/iter_0000004",
        f"{folder}/dpo/iter_0000002",
    ]


@pytest.fixture
def curves(tmp_path: Path) -> dict[str, dict[int, Curve]]:
    """Refusal is the same; the general loss grows half as much in the second."""
    scores(tmp_path / "start.json", (0.0, 0.0, 1.6))
    made: dict[str, dict[int, Curve]] = {}
    for name, growth in ((PLAIN, 0.2), ("update-tensor", 0.1)):
        scores(
            tmp_path / f"{name}.json",
            *((share, share / 2, 1.6 + share * growth) for share in (0.5, 0.8, 1.0, 0.9)),
        )
        made[name] = {1: read_curve(tmp_path / "start.json", tmp_path / f"{name}.json", SIZES)}
    return made


def test_steps_of_dpo_go_on_after_those_of_sft(curves: dict[str, dict[int, Curve]]) -> None:
    assert [point.step for point in curves[PLAIN][1]] == [0, 2, 4, 6, 7]
    assert at_safety(curves[PLAIN][1], 0.7, "benign_refused", "unsafe_refused") == pytest.approx(0.35)


def test_the_report_has_the_ends_and_the_cost_at_equal_refusal(
    curves: dict[str, dict[int, Curve]], tmp_path: Path
) -> None:
    table, data, plot = write_report(curves, SIZES, tmp_path / "report")
    tables = table.read_text(encoding="utf-8")
    assert "| plain | 80.0 % | 40.0 % | 1.7600 | 90.0 % | 45.0 % | 1.7800 |" in tables  # steps 4 and 7
    levels = "+0.0400 (1); 20% | +0.0500 (1); 25% | +0.0600 (1); 30% | +0.0700 (1); 35% | +0.0800 (1); 40%"
    assert f"| update, per tensor | {levels} | 50% |" in tables
    assert markdown_tables(read_json(data), SIZES) == tables
    assert plot.stat().st_size > 10_000
    rows = terminal_table(curves, SIZES).splitlines()
    assert rows[2].split()[-5:] == ["0.0", "%", "0.0", "%", "1.6000"]
    alone = write_report({"update-tensor": curves["update-tensor"]}, SIZES, tmp_path / "alone")
    assert [path.name for path in alone] == ["table.md", "results.json"]


def test_look_alikes_are_of_the_seeds_that_the_growth_is_of(curves: dict[str, dict[int, Curve]]) -> None:
    """Plain fine-tuning of seed 2 reaches no level."""
    start, *others = curves["update-tensor"][1]
    curves["update-tensor"][2] = [start, *(replace(point, benign_refused=0.0) for point in others)]
    curves[PLAIN][2] = [start] * len(curves[PLAIN][1])
    row = "| update, per tensor | +0.0400 (1); 20% | +0.0500 (1); 25% |"
    assert row in markdown_tables(curves, SIZES)
