"""The benchmark of whole runs: its configurations, what it reads from logs, and its arithmetic. No run is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ogpsa.benchmarks import every_second_step, training, trl_training
from megatron_ogpsa.benchmarks.report import training_rows
from megatron_ogpsa.benchmarks.speeds import is_projected, read_in_turn, read_speed
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.console.commands import Command
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags

STEP_MILLISECONDS = {"plain": 400.0, "gradient": 440.0, "update": 500.0}
REFRESH_MILLISECONDS = 3000.0
AS_A_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    for name in ("sft", "dpo", "reference"):
        row = {"prompt": "a", "chosen": "b", "rejected": "c"} if name == "dpo" else {"prompt": "a", "response": "b"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    sources = [f"--{name}={tmp_path / name}.jsonl" for name in ("sft", "dpo", "reference")]
    return [str(tmp_path / "model"), *sources, f"--out={tmp_path / 'out'}", "--steps=6", "--rounds=2", "--rows=4"]


def write_log(step: Command) -> None:
    """As a run of six steps leaves it; the first two are slow, and the first and the fourth begin with a refresh."""
    config = next(Path(part) for part in step.argv if part.endswith(".yaml"))
    stage, setting = config.stem.split("-")
    data = config.with_name(f"{stage}.jsonl")
    lines = [f"data {data}: 40 samples in 10 rows of 512 positions, 50.0% tokens, 50.0% padding"]
    for number in range(1, 7):
        refresh = 0.0 if setting == "plain" else REFRESH_MILLISECONDS * (2 if number < 4 else 1)
        taken = STEP_MILLISECONDS[setting] * (3 if number < 3 else 1) + (refresh if number in (1, 4) else 0.0)
        lines.append(
            f" [2026-01-01] iteration {number:8}/       6 | elapsed time per iteration (ms): {taken} | lm loss: 1.0E+00 | "
            f"ogpsa refresh (ms): {refresh:E} |"
        )
    step.log.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_settings_take_turns_and_ratios_count_refreshes(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    titles, commands = [], []

    def run_commands(steps: Sequence[Command]) -> None:
        for step in steps:
            titles.append(step.title)
            commands.append(step.argv)
            if "train" in step.argv:
                write_log(step)

    monkeypatch.setattr(training, "run_commands", run_commands)
    flags = ["--train-flags", "--transformer-impl local --no-masked-softmax-fusion"]
    assert training.main([*command, *flags, "--json", str(tmp_path / "figures.json")]) == 0
    assert commands[1][-3:] == ["--transformer-impl", "local", "--no-masked-softmax-fusion"]
    in_turn = [f"{stage} {name}" for stage in ("sft", "dpo") for name in ("plain", "gradient", "update")]
    assert titles == ["to Megatron", *(f"{title}, round {number}" for number in (1, 2) for title in in_turn)]
    account = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    found = {(result["stage"], result["setting"]): result for result in account["results"]}
    assert found["sft", "plain"]["tokens of a step"] == 4 * 512 * 0.5
    assert found["sft", "plain"]["tokens per second"] == pytest.approx(1024 / 0.4)
    assert found["sft", "plain"]["seconds of a refresh"] is None
    assert found["sft", "update"]["seconds of each step"] == [[0.5] * 3] * 2  # the third, the fifth and the sixth
    assert found["dpo", "update"]["of plain"] == pytest.approx(400 / 500)
    assert found["dpo", "update"]["of plain, with refreshes"] == pytest.approx(0.4 / (0.5 + 3.0 / 5))
    assert found["sft", "gradient"]["of plain, with refreshes"] == pytest.approx(0.4 / (0.44 + 3.0 / 30))
    assert "sft update" in capsys.readouterr().out


def test_trls_trainers_take_their_turns(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of theirs: 800 tokens in 2 s; every third of six begins with a refresh."""

    def run_commands(steps: Sequence[Command]) -> None:
        for step in steps:
            if trl_training.__name__ in step.argv:
                args = trl_training.parser().parse_args(step.argv[3:])
                assert (args.tokens_per_step, args.steps, args.refresh_interval) == (4 * 512, 6, 3)
                refresh = 6.0 if args.rule == "authors" else 0.0
                told = [
                    {"tokens": 800, "positions": 1000, "seconds": 2.0, "refresh_seconds": refresh * (number % 3 == 0)}
                    for number in range(6)
                ]
                args.json.write_text(json.dumps({"steps": told}), encoding="utf-8")
            elif "train" in step.argv:
                write_log(step)

    monkeypatch.setattr(training, "run_commands", run_commands)
    assert training.main([*command, "--trl", "--json", str(tmp_path / "figures.json")]) == 0
    account = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    found = {(result["stage"], result["setting"]): result for result in account["results"]}
    assert len(found) == 2 * 5
    own = found["dpo", "TRL, authors"]
    assert own["share of positions that are tokens"] == 0.8
    assert own["of plain"] == pytest.approx((800 / 2.0) / (1024 / 0.4))
    assert own["of plain, with refreshes"] == pytest.approx(800 / (2.0 + 6.0 / 5) / (1024 / 0.4))
    assert found["sft", "TRL, plain"]["seconds of a refresh"] is None


def test_in_one_run_projected_steps_are_compared_with_their_neighbours(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of twelve steps the first and the seventh begin with a refresh; the machine becomes slower all the time."""
    in_turn = []

    def run_commands(steps: Sequence[Command]) -> None:
        for step in steps:
            if training.EVERY_SECOND_STEP in step.argv:
                in_turn.append(step)
                lines = [
                    f" [2026-01-01] iteration {number:8}/      12 | elapsed time per iteration (ms): {taken} |"
                    for number in range(1, 13)
                    for taken in [10.0**number * (1.25 if number % 2 == 0 else 10.0)]
                ]
                step.log.write_text("\n".join(lines) + "\n", encoding="utf-8")
            elif "train" in step.argv:
                write_log(step)

    monkeypatch.setattr(training, "run_commands", run_commands)
    assert training.main([*command, "--in-turn", "--nproc", "4", "--json", str(tmp_path / "figures.json")]) == 0
    names = [(stage, setting) for stage in ("sft", "dpo") for setting in ("gradient", "update")]
    assert [step.title for step in in_turn] == [
        f"{stage} {setting} in turn, round {number}" for number in (1, 2) for stage, setting in names
    ]
    assert in_turn[0].argv[-4:] == ["--train-iters", "12", "--ogpsa-refresh-interval", "6"]
    assert "--nproc-per-node 4" in " ".join(in_turn[0].argv)
    account = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    ratios = {(result["stage"], result["setting"]): result["of plain, in turn"] for result in account["results"]}
    assert ratios.pop(("sft", "plain")) is ratios.pop(("dpo", "plain")) is None
    assert ratios == {name: pytest.approx(1 / 1.25) for name in names}
    header, *rows = training_rows(account["results"])
    assert header[-1] == "of plain, steps in turn"
    assert [row[-1] for row in rows[:3]] == ["–", "0.800", "0.800"]
    for result in account["results"]:
        del result["of plain, in turn"]
    assert {len(row) for row in training_rows(account["results"])} == {len(header) - 1}
    assert "step by step in one run 0.800" in capsys.readouterr().out


def test_a_pair_of_steps_with_a_refresh_does_not_count(tmp_path: Path) -> None:
    lines = [
        f" [2026-01-01] iteration {number:8}/       6 | elapsed time per iteration (ms): {taken} |"
        for number, taken in enumerate((900.0, 900.0, 900.0, 500.0, 400.0, 500.0), 1)
    ]
    (tmp_path / "log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_in_turn(tmp_path / "log", [1, 3]) == pytest.approx(400 / 500)


def test_every_second_step_is_projected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_ogpsa.integration import stages
    from megatron_ogpsa.integration.projection.run import ProjectionRun

    before, given = [], []
    config = tmp_path / "run.yaml"
    config.write_text("lr: 1.0e-6\n", encoding="utf-8")
    for name, value in AS_A_RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stages, "ProjectionRun", ProjectionRun)  # restored at the end
    monkeypatch.setattr(ProjectionRun, "before_step", lambda *arguments: before.append(arguments[-1]))
    monkeypatch.setattr(every_second_step, "run_verb", lambda argv: given.append(argv) or 0)
    assert every_second_step.main([str(config), "--lr", "1e-6"]) == 0
    assert given == [["train", str(config), "--lr", "1e-6"]]
    run = object.__new__(stages.ProjectionRun)
    run._ogpsa = SimpleNamespace(enabled=None)
    projected = []
    for step in range(4):
        run.before_step([], None, lambda: None, step)
        projected.append(run._ogpsa.enabled)
    assert before == [0, 1, 2, 3]
    assert projected == [False, True, False, True]
    assert projected == [is_projected(number) for number in range(1, 5)]


def test_where_every_step_would_be_projected_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("stages:\n  sft: {ogpsa-stage: sft}\n", encoding="utf-8")
    for name in AS_A_RANK:
        monkeypatch.delenv(name, raising=False)
    assert every_second_step.main([str(config)]) == UserError.exit_code
    assert "start it with torchrun" in capsys.readouterr().err
    for name, value in AS_A_RANK.items():
        monkeypatch.setenv(name, value)
    assert every_second_step.main([str(config)]) == UserError.exit_code
    assert f"error: {config}: 'stages' run one after the other" in capsys.readouterr().err


def test_megatron_is_imported_when_its_runtime_is_in_place() -> None:
    """On a CPU else its fused functions are compiled, which those of other runs are not."""
    program = "import sys, megatron_ogpsa.benchmarks.every_second_step; sys.exit('megatron.core' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_runs_differ_in_the_projection_alone(command: list[str], tmp_path: Path) -> None:
    args = training._parser().parse_args(command)
    start = tmp_path / "out/start"
    start.mkdir(parents=True)
    (start / "model.yaml").write_text("num-layers: 2\n", encoding="utf-8")

    def flags(stage: str, setting: str) -> Namespace:
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(training.config(args, stage, setting)), encoding="utf-8")
        return parse_flags(ConfigFile.read(path).as_flags(build_parser(), []))

    for stage in ("sft", "dpo"):
        plain = vars(flags(stage, "plain"))
        for setting in ("gradient", "update"):
            other = vars(flags(stage, setting))
            assert other["ogpsa_space"] == setting
            assert other["ogpsa_refresh_interval"] == 3
            assert all(name.startswith("ogpsa_") for name in plain if plain[name] != other[name])


def test_what_is_missing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert training.main(["model", "--reference", "r.jsonl"]) == 2
    assert "give --sft FILE, --dpo FILE or both" in capsys.readouterr().err
    assert training.main(["model", "--sft", "s.jsonl", "--reference", "r.jsonl", "--steps", "4"]) == 2
    assert "--steps 4: use 5 or more" in capsys.readouterr().err
    assert training.main(["model", "--sft", "s.jsonl", "--reference", str(tmp_path / "r.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "log").write_text("nothing\n", encoding="utf-8")
    with pytest.raises(UserError, match="tells neither rows nor times"):
        read_speed(tmp_path / "log", Path("data"), 4, [1])
    with pytest.raises(UserError, match="tells neither rows nor times"):
        read_in_turn(tmp_path / "log", [1])
