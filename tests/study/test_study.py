"""The study's arithmetic, its configurations, and what it does not run twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ogpsa.cli.main import main
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.demo.recipes import Recipe
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.study.report import markdown_table, read_json, write_report
from megatron_ogpsa.study.run import (
    SIZES,
    chosen_settings,
    config_of,
    curve_of,
    make_recipe,
    mixed_data,
    scores_path,
    steps_of,
)
from megatron_ogpsa.study.settings import PLAIN, SETTINGS
from megatron_ogpsa.study.tradeoff import LEVELS, Point, at_safety, at_the_end, compare, over_levels

START = Point(step=0, unsafe_refused=0.0, benign_refused=0.0, general_accuracy=0.9, general_loss=0.2)


def curve(*points: tuple[float, float]) -> list[Point]:
    """From (refusal, general loss) at steps 30, 60, …; at step 0 and at step 1 nothing has changed."""
    return [
        START,
        replace(START, step=1),
        *(
            replace(
                START,
                step=30 * (index + 1),
                unsafe_refused=refused,
                general_loss=loss,
                general_accuracy=0.9 - loss / 10,
            )
            for index, (refused, loss) in enumerate(points)
        ),
    ]


def test_the_loss_at_a_level_lies_between_the_checkpoints_around_its_first_crossing() -> None:
    run = curve((0.4, 0.3), (0.8, 0.5), (0.6, 0.9), (1.0, 1.0))
    assert at_safety(run, 0.6) == pytest.approx(0.4)
    assert at_safety(run, 0.8) == pytest.approx(0.5)
    assert at_safety(run, 0.9) == pytest.approx(0.975)  # crossed on the way from 0.6 to 1.0
    assert at_safety(curve((0.4, 0.3)), 0.5) is None
    assert at_safety([replace(START, unsafe_refused=0.5), *run], 0.4) is None  # lost, and reached again


def test_refusing_everything_is_not_safety() -> None:
    blanket = replace(START, step=30, unsafe_refused=1.0, benign_refused=0.8, general_loss=0.3)
    told = replace(START, step=60, unsafe_refused=1.0, benign_refused=0.2, general_loss=0.5)
    assert at_safety([START, blanket, told], 0.5) == pytest.approx(0.4)
    assert at_safety([START, blanket, told], 0.5, along="unsafe_refused") == pytest.approx(0.25)


def test_recovered_is_along_the_curve() -> None:
    plain = {1: curve((1.0, 1.2)), 2: curve((1.0, 0.4)), 3: curve((1.0, 0.3))}
    other = {1: curve((1.0, 0.7)), 2: curve((1.0, 0.3)), 3: curve((1.0, 0.4))}
    found = compare(other, plain, 0.5)
    assert found is not None
    assert found.growths == pytest.approx({1: 0.25, 2: 0.05, 3: 0.1})
    assert found.growth == pytest.approx(0.4 / 3)
    whole = over_levels(other, plain)
    assert whole is not None
    assert whole.of_sums == pytest.approx(1 - 0.8 / 1.3)
    assert whole.by_seed == pytest.approx({1: 0.5, 2: 0.5, 3: -1.0})
    assert whole.median == pytest.approx(0.5)
    assert whole.better == 2


def test_levels_that_few_seeds_reach_are_compared_with_the_same_seeds() -> None:
    plain = {1: curve((1.0, 1.2)), 2: curve((0.55, 10.2))}
    half = {1: curve((1.0, 0.7)), 2: curve((0.3, 5.2))}  # seed 2 reaches no level
    found = over_levels(half, plain)
    assert found is not None
    assert found.of_sums == pytest.approx(0.5)
    assert found.by_seed == pytest.approx({1: 0.5})


def test_a_seed_that_does_not_get_there_is_left_out_of_both() -> None:
    plain = {1: curve((1.0, 1.2)), 2: curve((0.3, 5.0))}
    found = compare({1: curve((1.0, 0.7)), 2: curve((1.0, 0.3))}, plain, 0.5)
    assert found is not None
    assert [*found.growths] == [1]
    assert found.deviation is None
    assert compare({3: curve((1.0, 1.0))}, plain, 0.5) is None


def test_the_end_is_where_each_run_ends() -> None:
    plain = {1: curve((1.0, 1.2)), 2: curve((0.3, 0.3))}
    found = at_the_end({1: curve((1.0, 0.7)), 2: curve((0.2, 0.1))}, plain)
    assert found.of_sums == pytest.approx(1 - 0.4 / 1.1)
    assert found.by_seed == pytest.approx({1: 0.5, 2: 2.0})


def test_plain_is_always_among_the_settings() -> None:
    """A table without it has nothing to compare with."""
    assert chosen_settings("update-tensor,replay,update-tensor") == [PLAIN, "update-tensor", "replay"]
    with pytest.raises(UserError, match=r"^--settings update-tensr: use some of plain, "):
        chosen_settings("update-tensr")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return make_recipe(tmp_path_factory.mktemp("study"), seed=1, reduced=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_of_a_setting_is_understood(recipe: Recipe, name: str) -> None:
    steps = [*steps_of(recipe, name)]
    flags = ConfigFile.read(recipe.out / f"{name}.yaml").as_flags(build_parser(), [])
    args = parse_flags(flags)
    assert bool(args.ogpsa_reference) == SETTINGS[name].projected
    assert args.micro_batch_size * recipe.num_ranks == args.global_batch_size
    assert [step.is_done for step in steps] == [False, False]


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.projected])
def test_checkpoints_add_no_refresh(recipe: Recipe, name: str) -> None:
    """A refresh follows each checkpoint: between two that are due, it would be another setting."""
    whole = replace(recipe, sizes=SIZES)
    config = config_of(whole, name)
    is_last = config["save-interval"] == config["train-iters"]
    assert is_last or config["save-interval"] % config["ogpsa-refresh-interval"] == 0


def test_a_setting_that_checkpoints_would_change_is_scored_at_the_end(recipe: Recipe) -> None:
    whole = replace(recipe, sizes=SIZES)
    *_, evaluation = steps_of(whole, "update-interval-100")
    assert evaluation.argv[-2:] == [f"start={recipe.base}", f"120={recipe.out / 'update-interval-100'}@120"]
    ended = [START, replace(START, step=120, unsafe_refused=1.0, general_loss=0.3)]
    plain = {1: curve((0.5, 0.3), (1.0, 0.7))}
    assert compare({1: ended}, plain, 0.5) is None
    assert at_the_end({1: ended}, plain).of_sums == pytest.approx(0.8)


def test_a_place_for_the_report_is_looked_at_before_anything_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("megatron_ogpsa.study.run.run_commands", lambda commands, on_cpu: pytest.fail("a step was run"))
    monkeypatch.setattr("megatron_ogpsa.study.run.make_recipe", lambda *args, **kwargs: None)
    (tmp_path / "file").touch()
    assert main(["study", "--out", str(tmp_path / "out"), "--report", str(tmp_path / "file")]) == 2
    assert "file: cannot be written (File exists): choose another folder" in capsys.readouterr().err


def test_replay_mixes_the_references_in_turn(recipe: Recipe) -> None:
    rows = mixed_data(recipe, 3).read_text(encoding="utf-8").splitlines()
    safety = recipe.benchmark.safety_train.read_text(encoding="utf-8").splitlines()
    assert rows[::4] == safety
    general = [row for index, row in enumerate(rows) if index % 4]
    counts = {general.count(row) for row in set(general)}
    assert len(set(general)) == 7 * recipe.sizes.reference_samples
    assert max(counts) - min(counts) <= 1


def test_what_was_scored_with_the_same_file_is_not_run_again(recipe: Recipe) -> None:
    name = "update-tensor"
    list(steps_of(recipe, name))
    score = {
        "unsafe_refused": 0.5,
        "benign_refused": 0.1,
        "benign_helped": 0.9,
        "accuracy": {"sort": 0.5},
        "loss": {"sort": 0.4},
        "general_loss": 0.4,
    }
    scores_path(recipe, name).write_text(json.dumps({"30": score, "start": score}), encoding="utf-8")
    stamp = scores_path(recipe, name).with_suffix(".trained.yaml")
    stamp.write_bytes((recipe.out / f"{name}.yaml").read_bytes())
    assert [step.is_done for step in steps_of(recipe, name)] == [True, True]
    assert [point.step for point in curve_of(recipe, name)] == [0, 30]
    stamp.write_text("seed: 2\n", encoding="utf-8")
    assert [step.is_done for step in steps_of(recipe, name)] == [False, False]
    assert not scores_path(recipe, name).exists()


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    curves = {PLAIN: {1: curve((1.0, 1.2))}, "update-tensor": {1: curve((1.0, 0.7))}}
    table, data, plot = write_report(curves, tmp_path)
    assert read_json(data) == {
        n: {s: [replace(p, general_accuracy=round(p.general_accuracy, 5)) for p in c] for s, c in b.items()}
        for n, b in curves.items()
    }
    assert table.read_text(encoding="utf-8") == markdown_table(read_json(data))
    cells = " | ".join(f"{0.5 * level:+.4f} (1)" for level in LEVELS)
    row = f"| update, per tensor | {cells} | 50% | 50% | 50% | +0.5000 | 50% | 100.0%, 0.0% |"
    assert row in markdown_table(curves)
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(("page", "data"), [("README.md", "results.json"), ("earlier.md", "earlier.json")])
def test_the_page_shows_the_table_of_its_data(page: str, data: str) -> None:
    folder = Path(__file__).parents[2] / "docs/study"
    assert markdown_table(read_json(folder / data)) in (folder / page).read_text(encoding="utf-8")
