"""Scores, the share of the tax that is recovered, and the report."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ogpsa.cli.main import main
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.console.training_log import Curve, read_curves
from megatron_ogpsa.demo import evaluate
from megatron_ogpsa.demo.benchmark import Benchmark, BenchmarkSpec, read_conversations, write_benchmark
from megatron_ogpsa.demo.recipes import START, VARIANTS, DemoSizes, Recipe
from megatron_ogpsa.demo.report import terminal_table, write_report
from megatron_ogpsa.demo.results import Results, Run
from megatron_ogpsa.demo.run import plan_steps
from megatron_ogpsa.demo.scoring import Scores, score, tax_recovered
from megatron_ogpsa.demo.tasks import GENERAL_TASKS
from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
from megatron_ogpsa.integration.inputs import datasets
from megatron_ogpsa.pipeline.plan import plan_stages

START_SCORES = Scores(
    unsafe_refused=0.0,
    benign_refused=0.0,
    benign_helped=1.0,
    accuracy={"addition": 1.0, "sort": 0.8},
    loss={"addition": 0.1, "sort": 0.3},
    general_loss=0.2,
)
PLAIN = replace(START_SCORES, unsafe_refused=1.0, accuracy={"addition": 0.5, "sort": 0.5}, general_loss=1.0)
HALF = replace(PLAIN, accuracy={"addition": 0.8, "sort": 0.6}, general_loss=0.6)


def test_recovered_is_the_share_of_what_plain_fine_tuning_lost() -> None:
    start, plain = (0.9, 0.2), (0.5, 1.0)
    found = tax_recovered(start, plain, (0.7, 0.6))
    assert found.accuracy == pytest.approx(0.5)
    assert found.loss == pytest.approx(0.5)
    assert tax_recovered(start, plain, plain).accuracy == 0.0
    assert tax_recovered(start, start, plain).accuracy is None  # no tax, no share


def test_scores_of_a_model_that_knows_all_answers(tmp_path: Path) -> None:
    """A stand-in for the model: it looks the prompts up, so that every score is known."""
    benchmark = write_benchmark(tmp_path, BenchmarkSpec(base_train=70, reference_per_task=2, eval_per_task=4))
    book = {}
    for path in [
        benchmark.eval_unsafe,
        benchmark.eval_benign,
        *(benchmark.eval_general(t.name) for t in GENERAL_TASKS),
    ]:
        book |= {example.request: example.answer for example in read_conversations(path)}

    class Words:
        """A tokenizer whose ids are positions in one list of texts."""

        def __init__(self) -> None:
            self.texts: list[str] = []

        def _id(self, text: str) -> int:
            self.texts.append(text)
            return len(self.texts) - 1

        def encode_prompt(self, messages: list[dict[str, str]]) -> list[int]:
            return [self._id(messages[0]["content"])]

        def decode(self, ids: list[int]) -> str:
            return self.texts[ids[0]]

    words = Words()

    def generate(prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        return [[words._id(book[words.texts[prompt[0]]])] for prompt in prompts]

    def loss(conversations: Path) -> tuple[float, int]:
        return (2.0, 30) if conversations == benchmark.eval_general(GENERAL_TASKS[0].name) else (1.0, 10)

    scores = score(Benchmark(tmp_path), words, generate, loss)
    assert scores.unsafe_refused == scores.benign_refused == 0.0
    assert scores.benign_helped == 1.0
    assert scores.general_accuracy == 1.0
    others = 10 * (len(GENERAL_TASKS) - 1)
    assert scores.general_loss == (2.0 * 30 + others) / (30 + others)  # each token with the same weight


def results(*seeds: int) -> Results:
    """Each seed loses a tenth more of addition than the one before it; projection gives back half of the first's tax."""

    def run(seed: int) -> Run:
        worse = {"addition": 0.5 - 0.1 * (seed - 1), "sort": 0.5}
        scores = dict.fromkeys(VARIANTS, replace(PLAIN, accuracy=worse)) | {"sft-paper": HALF}
        curve = Curve([1, 2], [0.5, 0.25])
        return Run(
            seed=seed,
            scores={START: START_SCORES, **scores},
            curves={"sft": {"lm loss": curve}, "dpo": {"dpo loss": curve}},
        )

    return Results(variants={START: None, **VARIANTS}, runs=[run(seed) for seed in seeds], notes=("a note",))


def test_report_files(tmp_path: Path) -> None:
    paths = write_report(results(1), tmp_path)
    assert [path.name for path in paths] == ["report.md", "results.csv", "tasks.png", "tradeoff.png", "training.png"]
    rows = list(csv.DictReader(paths[1].open(encoding="utf-8")))
    recovered = {row["variant"]: row["value"] for row in rows if row["measure"] == "recovered_accuracy"}
    assert {name: float(value) for name, value in recovered.items()} == pytest.approx(
        {"sft-paper": 0.5, "sft-model": 0.0, "sft-ogpsa": 0.0, "dpo-ogpsa": 0.0, "sft-dpo-ogpsa": 0.0}
    )
    assert "a note" in paths[0].read_text(encoding="utf-8")
    last = terminal_table(results(1)).splitlines()[-1]
    assert re.split(r"  +", last) == ["tax recovered: loss", "–", "–", "50 %", "0 %", "0 %", "–", "0 %", "–", "0 %"]


def test_several_seeds_give_mean_and_spread(tmp_path: Path) -> None:
    paths = write_report(results(1, 2, 3), tmp_path)
    assert len({row["seed"] for row in csv.DictReader(paths[1].open(encoding="utf-8"))}) == 3 + len(["all"])
    table = {line[:24].strip(): re.split(r"  +", line)[1:] for line in terminal_table(results(1, 2, 3)).splitlines()}
    assert table["accuracy: addition"][1] == "40.0 ± 10.0 %"
    assert table["refusal on unsafe"][1] == "100.0 ± 0.0 %"
    # Of the means: start 0.9, plain 0.45, projected 0.7.
    assert table["tax recovered: accuracy"][2] == "56 %"


def test_curves_come_from_megatrons_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        " [2026-01-01] iteration        7/      80 | consumed samples:          224 | lm loss: 2.5E-01 | "
        "ogpsa removed: 1.0E-02 | grad norm: 1.500 |\nanother line\n",
        encoding="utf-8",
    )
    curves = read_curves(log)
    assert curves["lm loss"].steps == [7]
    assert curves["lm loss"].values == [0.25]
    assert curves["ogpsa removed"].values == [0.01]


@pytest.mark.parametrize("flags", ["--seed 0", "--seeds 0"])
def test_seeds_that_cannot_be_are_told_before_data_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    monkeypatch.setattr("megatron_ogpsa.demo.run.make_recipe", lambda *args: pytest.fail("data were written"))
    assert main(["demo", "--out", str(tmp_path), *flags.split()]) == 2
    assert f"{flags}: use 1 or more" in capsys.readouterr().err


def test_checkpoints_may_lie_in_a_folder_with_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "evaluate.yaml"
    config.write_text("num-layers: 1\n", encoding="utf-8")
    loaded: list[tuple[str, int | None]] = []
    model = SimpleNamespace(load=lambda folder, iteration: loaded.append((folder, iteration)))
    monkeypatch.setattr(LoadedModel, "build", lambda flags: model)
    monkeypatch.setattr(datasets, "chat_tokenizer", lambda: None)
    monkeypatch.setattr(evaluate, "score", lambda *args: SimpleNamespace(as_json=dict))
    list(evaluate.evaluate(config, tmp_path, {"start": "me@home/base", "30": "me@home/sft@30"}))
    assert loaded == [("me@home/base", None), ("me@home/sft", 30)]


def test_the_starting_model_is_kept_only_for_the_same_config(tmp_path: Path) -> None:
    benchmark = write_benchmark(tmp_path / "data", BenchmarkSpec(base_train=70, reference_per_task=2, eval_per_task=2))

    def base_is_done(*, seed: int = 1, fresh: bool = False) -> bool:
        recipe = Recipe(benchmark=benchmark, sizes=DemoSizes(), out=tmp_path, num_ranks=2, seed=seed)
        steps = plan_steps(recipe, fresh=fresh)
        assert len(steps) == 2 + len(VARIANTS)
        return steps[0].is_done

    assert not base_is_done()
    (tmp_path / "base-trained.yaml").write_bytes((tmp_path / "base.yaml").read_bytes())
    assert base_is_done()
    assert not base_is_done(fresh=True)
    (tmp_path / "base-trained.yaml").write_bytes((tmp_path / "base.yaml").read_bytes())
    assert not base_is_done(seed=2)


def test_every_config_of_the_demo_is_one_that_megatron_takes(tmp_path: Path) -> None:
    recipe = Recipe(benchmark=Benchmark(tmp_path), sizes=DemoSizes(), out=tmp_path, num_ranks=4, seed=1)
    plan_steps(recipe, fresh=True)
    parser = build_parser()
    for name, settings in recipe.configs().items():
        config = ConfigFile.read(tmp_path / f"{name}.yaml")
        if "stages" in settings:
            sft, dpo = (parse_flags(stage.flags(parser)) for stage in plan_stages(config, []))
            assert sft.pretrained_checkpoint == str(tmp_path / "base")
            assert dpo.pretrained_checkpoint == sft.save == str(tmp_path / name / "sft")
        else:
            dpo = parse_flags(config.as_flags(parser, []))
            assert dpo.pretrained_checkpoint == str(tmp_path / "base")
        assert dpo.ogpsa_stage == "dpo"
        assert len(dpo.ogpsa_reference) == (0 if "plain" in name else len(GENERAL_TASKS))
        assert dpo.ogpsa_granularity == ("model" if "model" in name else "tensor")
        asked_for = ("gradient", "orthogonal") if "paper" in name else (None, None)  # for the defaults
        assert (dpo.ogpsa_space, dpo.ogpsa_mode) == asked_for
