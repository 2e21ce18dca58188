"""What was generated and scored is kept, whatever fails afterwards; and what can be known before is told before."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ogpsa.data.prompts import Prompt
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation import judging, scoring
from megatron_ogpsa.evaluation.report import require_place
from megatron_ogpsa.evaluation.scores import Answered
from megatron_ogpsa.integration.checkpoints.loaded_model import require_checkpoint
from tests.checkpoints.damage import flipped
from tests.evaluation.conftest import LAYOUTS, Evaluate

ANSWERED = "--prompts a=prompts.jsonl --max-new-tokens 2"
LOADING = "loading distributed checkpoint"
"""Megatron's words, of each checkpoint."""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_outlive_a_judge_that_raises(evaluate: Evaluate, folder: Path) -> None:
    """With the verdicts before it, which may have cost money."""
    (folder / "tiring_judge.py").write_text(
        "seen = []\ndef judge(prompt, answer):\n    seen.append(answer)\n    return 0.25 if len(seen) < 5 else 1 / 0\n",
        encoding="utf-8",
    )
    asked = f"{ANSWERED} --prompts b=prompts.jsonl --judge tiring_judge.py:judge --answers tired.jsonl"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    (error,) = outcome.error_lines
    assert "answer 5 of 7: it raised ZeroDivisionError" in error
    assert outcome.output.count("Before this failed, 14 answers were written: tired.jsonl") == 1
    kept = lines(folder / "tired.jsonl")
    assert [(row["prompts"], row["judged"]) for row in kept] == [
        *[("a", 0.25)] * 4,
        *[("a", None)] * 3,
        *[("b", None)] * 7,
    ]


def test_lost_answers_are_told_with_the_remedy(evaluate: Evaluate) -> None:
    outcome = evaluate(*LAYOUTS["dp2"].split(), *f"{ANSWERED} --judge bad_judge.py:judge".split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert outcome.output.count("7 answers are lost: --answers FILE would have kept them") == 1


def test_other_ranks_do_not_take_long_judging_for_a_hang(evaluate: Evaluate, folder: Path) -> None:
    """Seven times 1.3 s, and no rank may wait for more than 3 s, which takes the watch 2.5 s more to be sure of."""
    (folder / "patient_judge.py").write_text(
        "import time\ndef judge(prompt, answer):\n    time.sleep(1.3)\n    return True\n", encoding="utf-8"
    )
    asked = f"{ANSWERED} --judge patient_judge.py:judge --ogpsa-hang-timeout 3 --json patient.json"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 0, outcome.output[-3000:]
    (scores,) = json.loads((folder / "patient.json").read_text(encoding="utf-8"))["checkpoints"]
    assert scores["prompts"]["a"]["judged"]["value"] == 1.0


def test_answers_outlive_a_judge_that_does_not_answer(evaluate: Evaluate, folder: Path) -> None:
    """The process is ended from outside, and writes nothing then."""
    asked = f"{ANSWERED} --judge slow_judge.py:judge --ogpsa-hang-timeout 3 --answers hung.jsonl"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 3, outcome.output[-3000:]
    assert outcome.output.count("run: the answers to a are in hung.jsonl") == 1
    assert [row["judged"] for row in lines(folder / "hung.jsonl")] == [None] * 7


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("--compare run --load nowhere", "--load nowhere: there is no checkpoint: name a folder"),
        (
            "--compare run@3 --ckpt-step 5",
            "run/iter_0000005 is missing: restore it, or take iteration 6 or 3 with --ckpt-step",
        ),
        ("--json runs", "--json runs: cannot be written (Is a directory): name another file"),
        ("--answers prompts.jsonl/x", "--answers prompts.jsonl/x: cannot be written"),
        ("--ogpsa-packing --window-size 8,0", "--ogpsa-packing with --window-size"),
    ],
)
def test_what_can_be_known_before_is_told_before(evaluate: Evaluate, flags: str, fault: str) -> None:
    outcome = evaluate(*LAYOUTS["dp2"].split(), *f"{ANSWERED} --data d=odd.jsonl".split(), *flags.split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    (error,) = outcome.error_lines
    assert fault in error
    assert LOADING not in outcome.output
    # Megatron's words before it builds a model.
    assert ("setting random seeds" in outcome.output) == ("--ogpsa-packing" not in flags)


def test_scores_of_one_checkpoint_outlive_damage_of_the_next(evaluate: Evaluate, folder: Path) -> None:
    """In a file's contents, which is not looked at before it is loaded."""
    shutil.copytree(folder / "run", folder / "torn")
    flipped(folder / "torn/iter_0000006/__0_0.distcp")
    asked = f"--load torn --compare run --data d=odd.jsonl {ANSWERED} --json first.json --answers first.jsonl"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    (error,) = outcome.error_lines
    assert "torn/iter_0000006/__0_0.distcp is not what integrity.json says" in error
    (scores,) = json.loads((folder / "first.json").read_text(encoding="utf-8"))["checkpoints"]
    assert (scores["title"], scores["load"], scores["iteration"]) == ("before", "run", 6)
    assert [row["checkpoint"] for row in lines(folder / "first.jsonl")] == ["before"] * 7
    assert f"  loss                              {scores['data']['d']['loss']:.4f}".split() in [
        line.split() for line in outcome.output.splitlines()
    ]
    assert outcome.output.count("Before this failed, 7 answers were written: first.jsonl") == 1


def test_answers_outlive_scores_that_cannot_be_written(evaluate: Evaluate, folder: Path) -> None:
    (folder / "hostile_judge.py").write_text(
        "import os\ndef judge(prompt, answer):\n    os.makedirs('late.json/taken', exist_ok=True)\n    return True\n",
        encoding="utf-8",
    )
    asked = f"{ANSWERED} --judge hostile_judge.py:judge --json late.json --answers late.jsonl"
    outcome = evaluate(*LAYOUTS["dp2"].split(), *asked.split())
    assert outcome.exit_code == 2, outcome.output[-3000:]
    (error,) = outcome.error_lines
    assert "--json late.json: cannot be written" in error
    assert [row["judged"] for row in lines(folder / "late.jsonl")] == [1.0] * 7
    assert "  refused, by the judge  100.0 %" in outcome.output


def test_looking_leaves_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "new/answers.jsonl"
    require_place("--answers", path)
    assert list(path.parent.iterdir()) == []
    path.write_text("of another run", encoding="utf-8")
    require_place("--answers", path)
    assert [file.read_text(encoding="utf-8") for file in path.parent.iterdir()] == ["of another run"]
    with pytest.raises(UserError, match=r"--json .*new: cannot be written \(Is a directory\): name another file"):
        require_place("--json", path.parent)


def test_scores_do_not_take_the_place_of_a_device(tmp_path: Path) -> None:
    """As ``--json /dev/null`` and ``--json /dev/stdout`` would for root."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match=r"--json .*pipe: cannot be written \(not a regular file\): name another file"):
        require_place("--json", pipe)
    assert pipe.is_fifo()


def test_a_checkpoint_with_a_file_too_few_is_no_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not the one that was asked for does not stand for it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "run", tmp_path / "run")
    require_checkpoint("--load", "run", 3)
    require_checkpoint("--load", "run", None)
    (tmp_path / "run/iter_0000003/.metadata").unlink()
    with pytest.raises(UserError, match=r"--load run: .*metadata is missing: .* take iteration 6 with --ckpt-step$"):
        require_checkpoint("--load", "run", 3)
    shutil.move(tmp_path / "run/iter_0000006/.metadata", tmp_path / "run/iter_0000003")
    with pytest.raises(
        UserError, match=r"--compare run: .*metadata is missing: .* take iteration 3 with run@ITERATION$"
    ):
        require_checkpoint("--compare", "run", None)
    shutil.rmtree(tmp_path / "run/iter_0000003")
    with pytest.raises(UserError, match=r"--load run: .*metadata is missing.*: name a folder with latest_checkpointed"):
        require_checkpoint("--load", "run", 6)


def test_verdicts_are_written_while_a_judge_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed writes nothing more."""
    monkeypatch.setattr(judging, "from_rank_0", lambda action: action())
    monkeypatch.setattr(judging, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(judging, "KEEP_SECONDS", 0.0)
    answered = Answered([Prompt([{"role": "user", "content": "why"}], "here")] * 3, ["so"] * 3, [0.0] * 3, [None] * 3)
    kept: list[Any] = []
    request: Any = Namespace(judge=lambda prompt, answer: True, judge_name="j")
    judging.judge_together(request, answered, lambda: kept.append(list(answered.by_judge or ())))
    assert kept == [[1.0, None, None], [1.0, 1.0, None], [1.0, 1.0, 1.0]]


def test_as_many_prompts_go_together_as_the_flag_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that is more than a GPU's memory holds, the flag is named."""
    sizes = []

    def generate(*args: Any, batch_size: int, **kwargs: Any) -> list[list[int]]:
        sizes.append(batch_size)
        if batch_size == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return []

    tokenizer = Namespace(eos_ids=[0], pad_id=0, vocab_size=3)
    monkeypatch.setattr(scoring, "chat_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(scoring, "generate", generate)
    model: Any = None
    request: Any = Namespace(max_new_tokens=1, generation_batch_size=5)
    assert scoring._generated(model, "a", [], request) == []
    request.generation_batch_size = 7
    with pytest.raises(UserError, match=r"--prompts a: --generation-batch-size 7 .*: use a smaller one") as raised:
        scoring._generated(model, "a", [], request)
    assert sizes == [5, 7]
    assert not raised.value.is_alike
