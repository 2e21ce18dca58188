"""``megatron-ogpsa evaluate``: the same numbers in every layout, and mistakes in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.conftest import LAYOUTS, NUM_SAMPLES, ONE, Evaluate
from tests.harness import WorkerGroup
from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import CONFIG

SCORED = (
    "--data general=valid.jsonl --data odd=odd.jsonl --data pairs=pairs.jsonl --prompts unsafe=prompts.jsonl "
    "--judge judge.py:judge --max-new-tokens 6"
)


@pytest.fixture(scope="module")
def alone(folder: Path, preloaded: PreloadedCommand) -> dict[str, Any]:
    """Scores in one process, before and after the last three steps."""
    flags = f"{ONE} --tokenizer-model tokenizer --load run --compare run@6 --ckpt-step 3 {SCORED}"
    finished = preloaded.run(
        "megatron_ogpsa.cli.main",
        ["evaluate", str(CONFIG), *flags.split(), "--json", "one.json", "--answers", "one.jsonl"],
        folder=folder,
        timeout=200,
    )
    assert finished.exit_code == 0, finished.output[-3000:]
    (folder / "one.txt").write_text(finished.output, encoding="utf-8")
    scores: dict[str, Any] = json.loads((folder / "one.json").read_text(encoding="utf-8"))
    return scores


def test_the_loss_is_megatrons_own(folder: Path, alone: dict[str, Any]) -> None:
    """The 22 samples, no whole batches, by Megatron's validation after the last step; its log gives seven digits."""
    newest, older = alone["checkpoints"]
    assert [newest["iteration"], older["iteration"]] == [6, 3]
    (logged,) = re.findall(
        r"validation loss at iteration 6 .*?lm loss value: (\S+)", (folder / "train.log").read_text()
    )
    assert newest["data"]["general"]["loss"] == pytest.approx(float(logged), rel=2e-6)
    assert (
        abs(older["data"]["general"]["loss"] / newest["data"]["general"]["loss"] - 1) > 1e-4
    )  # those of two checkpoints


def test_the_table_has_both_checkpoints(folder: Path, alone: dict[str, Any]) -> None:
    table = (folder / "one.txt").read_text(encoding="utf-8").rpartition("before")[2].splitlines()
    loss = next(line for line in table if line.startswith("  loss "))
    expected = [f"{checkpoint['data']['general']['loss']:.4f}" for checkpoint in alone["checkpoints"]]
    assert loss.split()[1:] == expected
    assert any(line.startswith("unsafe: 7 prompts") for line in table)
    answers = [json.loads(line) for line in (folder / "one.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 14
    assert [row["judged"] for row in answers[:7]] == [
        float(len(row["prompt"][0]["content"]) % 2 == 0) for row in answers[:7]
    ]


def test_no_data_is_kept_where_the_configuration_saves(folder: Path, alone: dict[str, Any]) -> None:
    assert alone["checkpoints"]
    assert "save: runs/sft\n" in CONFIG.read_text(encoding="utf-8")
    assert [path.name for path in (folder / "runs/sft").iterdir()] == ["tensorboard"]


def test_positions_are_scaled_as_the_flags_say(evaluate: Evaluate, folder: Path) -> None:
    """Llama 3.2's factor is 32, which Megatron's own configuration forgets: its default is 8."""
    losses = []
    for factor in ("8", "32"):
        rope = f"--use-rope-scaling --rope-scaling-factor {factor} --rotary-base 500000"
        outcome = evaluate(*LAYOUTS["dp2"].split(), *rope.split(), *"--data a=general.jsonl --json rope.json".split())
        assert outcome.exit_code == 0, outcome.output[-3000:]
        (scores,) = json.loads((folder / "rope.json").read_text(encoding="utf-8"))["checkpoints"]
        losses.append(scores["data"]["a"]["loss"])
        other = {row["flag"]: (row["given"], row["checkpoint"]) for row in scores["differing_flags"]}
        expected: dict[str, Any] = {"--rotary-base": (500000, 10000), "--use-rope-scaling": (True, False)}
        assert other == expected | ({"--rope-scaling-factor": (32.0, 8.0)} if factor == "32" else {})
        told = [
            line for line in outcome.output.splitlines() if line.startswith("WARNING: run/iter_0000006 was saved with ")
        ]
        assert len(told) == len(other)
        assert all(flag in line for flag, line in zip(other, told, strict=True)), told
        assert (
            "--rotary-base 10000 and is loaded with --rotary-base 500000: give --rotary-base 10000, unless another"
        ) in told[0]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_the_same_in_every_layout(
    evaluate: Evaluate, folder: Path, alone: dict[str, Any], layout: str
) -> None:
    """Tolerance: fp32 forward passes whose sums are taken in another order; seen are some 1e-7."""
    given = f"{LAYOUTS[layout]} {SCORED} --json other.json --answers other.jsonl --generation-batch-size 3"
    outcome = evaluate(*given.split())
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "was saved with" not in outcome.output  # a layout is no other model
    (found,) = json.loads((folder / "other.json").read_text(encoding="utf-8"))["checkpoints"]
    expected = alone["checkpoints"][0]
    assert [found["data"][name]["samples"] for name in ("general", "odd", "pairs")] == [NUM_SAMPLES, 21, 13]
    for name, scores in expected["data"].items():
        assert found["data"][name] == {
            key: value if value is None else pytest.approx(value, rel=2e-6) for key, value in scores.items()
        }, name
    assert found["prompts"] == expected["prompts"]
    answers = [json.loads(line)["answer"] for line in (folder / "other.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (
        answers
        == [json.loads(line)["answer"] for line in (folder / "one.jsonl").read_text(encoding="utf-8").splitlines()][:7]
    )


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--load nowhere --data odd=odd.jsonl", "--load nowhere: there is no checkpoint"),
        (
            "--load run --prompts a=prompts.jsonl --judge bad_judge.py:judge --max-new-tokens 2",
            "answer 1 of 7: it raised ZeroDivisionError",
        ),
        ("--load run --data odd=odd.jsonl --fp8-format hybrid", "--fp8-format needs a GPU"),
        ("--load run --prompts a=prompts.jsonl --max-new-tokens 120", "are more than --max-position-embeddings 128"),
    ],
)
def test_mistakes_are_told_once_by_all_ranks(evaluate: Evaluate, flags: str, fault: str) -> None:
    outcome = evaluate(*LAYOUTS["dp2"].split(), *flags.split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1, outcome.error_lines
    assert fault in outcome.error_lines[0]


def test_a_judge_that_does_not_answer_ends_all_ranks(evaluate: Evaluate) -> None:
    """The other rank waits for its verdicts, and says who has them."""
    asked = "--prompts a=prompts.jsonl --judge slow_judge.py:judge --max-new-tokens 2 --ogpsa-hang-timeout 3"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 3, outcome.output[-3000:]
    (line,) = outcome.error_lines
    assert re.search(
        r"rank 1 .* has waited for \d+ s .*: rank 0\b.* is alive and computes .*slow_judge\.py:2\b", line
    ), line


def test_scales_of_any_stage_will_do(distributed: Callable[[int], WorkerGroup]) -> None:
    """A pipeline stage may have no layers that are run in FP8."""
    job = "tests.evaluation.scale_cases:scales_on"
    assert distributed(2).run(job, ranks=[1]) == ["", ""]
    first, second = distributed(2).run(job, ranks=[])
    assert first == second
    assert first.startswith("--load run: it was not trained with --fp8-recipe delayed and holds no scales for it")
