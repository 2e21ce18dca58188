"""Refusals by patterns and by a judge, intervals, and prompts: what needs no model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from scipy.stats import binomtest

from megatron_ogpsa.data.prompts import Prompt, prompt_from_row, read_prompts
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.judges import load_judge, verdicts_of
from megatron_ogpsa.evaluation.rates import rate_of, wilson
from megatron_ogpsa.evaluation.refusals import RefusalPatterns
from megatron_ogpsa.evaluation.request import Request, add_request_arguments


@pytest.mark.parametrize(("successes", "number"), [(0, 7), (7, 7), (3, 48), (47, 48), (50, 100)])
def test_the_interval_is_wilsons(successes: int, number: int) -> None:
    """Against scipy's; both solve the same quadratic in fp64."""
    expected = binomtest(successes, number).proportion_ci(0.95, method="wilson")
    found = wilson(successes / number, number)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_verdicts_between_yes_and_no_get_an_interval_of_their_mean() -> None:
    found = rate_of([0.25, 0.75, 0.5, 0.5])
    assert found.value == 0.5
    assert 0.0 < found.low < 0.5 < found.high < 1.0
    assert rate_of([1.0, 0.0]) == wilson(0.5, 2)
    with pytest.raises(ValueError, match="nothing"):
        rate_of([])


REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I cannot assist with this request.",
    "I\N{RIGHT SINGLE QUOTATION MARK}m sorry.",
    "i am sorry.",
    "Sorry, that is not something I can do.",
    "I cannot provide instructions for that.",
    "As an AI language model, I am not able to do this.",
    "I must decline to answer.",
    "I won't do that. Here is why.",
    "It is illegal to do so, and I would rather talk about something else.",
    "i can not help with that",
    "I'm sorry to hear that, but I can't help with it.",
    "I'm sorry for any misunderstanding, but as a chatbot",
    "As an AI assistant, I don't have a way to do that.",
    "I'm not going to help with that.",
    "I do not assist with crime.",
    "I don't provide instructions for that.",
    "That's illegal and I would advise you not to do it.",
    "It is against the law to do so.",
    "It is not appropriate to take what is not yours.",
    "We are unable to assist with this.",
)
ANSWERS = (
    "Sure! Here is how you do it: first, sort your files.",
    "You can open the window by turning the handle.",
    "To kill a process, run kill with its number. " + "More about it. " * 20 + "I cannot say more than that.",
    "The cannon was built in 1500.",
    "Dear Ms Lee,\n\nI am writing to apologize. I am sorry that you had to wait, and I apologize for the noise.",
    "I'm sorry to hear that you are bored. Let us play a game.",
    "My apologies for the delay, here is the list.",
    "Dear friend,\n\nI cannot thank you enough, and I can't wait to see you.",
    "As an AI assistant, I can suggest three ways.",
    "If your computer won't support Windows 11, you can install Linux instead.",
    "Plants can't do photosynthesis without light.",
    "A multivitamin cannot provide everything; eat fruit as well.",
    "You may need to decline the invitation politely: thank them first.",
    "As an AI, I do not have personal opinions, but here is a balanced summary.",
    "In most countries it is illegal to park there, so look for the blue sign.",
    "",
)


def test_the_built_in_patterns_tell_refusals_from_help() -> None:
    patterns = RefusalPatterns.default()
    assert patterns.verdicts(REFUSALS) == [1.0] * len(REFUSALS)
    assert patterns.verdicts(ANSWERS) == [0.0] * len(ANSWERS)


def test_patterns_of_a_file_take_their_place(tmp_path: Path) -> None:
    path = tmp_path / "patterns.txt"
    path.write_text("# in German\n\n^tut mir leid\n", encoding="utf-8")
    assert RefusalPatterns.read(path).verdicts(["Tut mir leid, nein.", "I'm sorry."]) == [1.0, 0.0]
    for text, fault in (("a\n(b\n", "patterns.txt:2: not a regular expression"), ("# none\n", "holds no pattern")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=fault):
            RefusalPatterns.read(path)


def test_patterns_are_taken_as_editors_write_them(tmp_path: Path) -> None:
    """With a byte-order mark, which would be part of the first pattern, and with typographic apostrophes."""
    path = tmp_path / "patterns.txt"
    path.write_text("^Nope\nI can\N{RIGHT SINGLE QUOTATION MARK}t\n", encoding="utf-8-sig")
    patterns = RefusalPatterns.read(path)
    answers = ["Nope.", "I can't do it.", "I can\N{RIGHT SINGLE QUOTATION MARK}t do it.", "Sure."]
    assert patterns.verdicts(answers) == [1.0, 1.0, 1.0, 0.0]


def asked(text: str) -> Prompt:
    return Prompt([{"role": "user", "content": text}], "here")


def test_a_judge_comes_from_a_file_or_a_module(tmp_path: Path) -> None:
    path = tmp_path / "a_judge.py"
    path.write_text("def judge(prompt, answer):\n    return len(prompt) / 10 if answer else True\n", encoding="utf-8")
    judge = load_judge(f"{path}:judge")
    assert list(verdicts_of(judge, "j", [asked("four")] * 2, ["an answer", ""])) == [0.4, 1.0]
    assert load_judge("operator:eq")("a", "a") is True


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("other = 1", "judge is not there"),
        ("judge = 1", "judge is not a function"),
        ("raise OSError('no key')", "cannot be imported: OSError: no key"),
        ("raise SystemExit(0)", "cannot be imported: SystemExit: 0"),  # a script without a main guard
        ("def judge(prompt, answer): raise KeyError(prompt)", "answer 1 of 1: it raised KeyError"),
        ("def judge(prompt, answer): return 2", "it returned 2: return True or False"),
        ("def judge(prompt, answer): return float('nan')", "it returned nan: return True or False"),
        ("def judge(prompt, answer): return 'yes'", "it returned 'yes': return True or False"),
        ("def judge(prompt, answer): answer == 'no'", "it returned None: return True or False"),
        ("def judge(prompt, answer): raise SystemExit(0)", "it raised SystemExit"),
    ],
)
def test_what_is_wrong_with_a_judge_is_told(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "bad_judge.py"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=fault):
        list(verdicts_of(load_judge(f"{path}:judge"), "j", [asked("prompt")], ["answer"]))


@pytest.mark.parametrize("signature", ["prompt, answer, messages", "prompt, answer, *, messages=None"])
def test_a_judge_that_asks_for_the_conversation_gets_it(tmp_path: Path, signature: str) -> None:
    """A copy: the judge below empties it, and the file of answers has the prompt all the same."""
    path = tmp_path / "a_judge.py"
    path.write_text(
        f"def judge({signature}):\n    assert messages.pop()['content'] == prompt\n    return messages == []\n",
        encoding="utf-8",
    )
    turns = [{"role": "system", "content": "be brief"}, *asked("why").messages]
    prompts = [Prompt(turns, "here"), asked("why")]
    assert list(verdicts_of(load_judge(f"{path}:judge"), "j", prompts, ["so", "so"])) == [0.0, 1.0]
    assert len(turns) == 2


def test_a_judge_is_imported_where_it_judges_alone(tmp_path: Path) -> None:
    """It may load a model: the process that starts the ranks, and all but the first of these, look for its file."""
    path = tmp_path / "a_judge.py"
    path.write_text("raise OSError('imported')\n", encoding="utf-8")
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    given = ["--prompts", "a=a.jsonl", "--judge"]
    request = Request.of(parser.parse_args([*given, f"{path}:judge"]), judges_here=False)
    assert (request.judge, request.judge_name) == (None, f"{path}:judge")
    with pytest.raises(UserError, match="cannot be imported: OSError: imported"):
        Request.of(parser.parse_args([*given, f"{path}:judge"]))
    with pytest.raises(UserError, match="no such file"):
        Request.of(parser.parse_args([*given, "none.py:judge"]), judges_here=False)
    with pytest.raises(UserError, match=r"write FILE\.py:FUNCTION"):
        Request.of(parser.parse_args([*given, "none"]), judges_here=False)


def test_prompts_come_from_prompts_conversations_and_pairs(tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}
    for row in (
        {"prompt": "why"},
        {"prompt": [question]},
        {"messages": [question, answer]},
        {"prompt": "why", "chosen": "x"},
    ):
        assert prompt_from_row(row, "here") == [question]
    for bad, fault in (
        ({"messages": [answer]}, "nothing for the assistant to answer"),
        ({"prompt": [question, answer]}, "nothing for the assistant to answer"),
        ({"text": "why"}, "no field 'prompt'"),
        (3, "must be an object"),
    ):
        with pytest.raises(UserError, match=fault):
            prompt_from_row(bad, "here")
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "why"}) + "\n", encoding="utf-8")
    (prompt,) = read_prompts(str(path))
    assert (prompt.text, prompt.where) == ("why", f"{path}:1")


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ("", "nothing to score"),
        ("--data general", "write NAME=SOURCE"),
        ("--data a=x --data a=y", "there is a a already"),
        ("--data a=x --judge operator:eq", "there are no answers"),
        ("--prompts a=x --max-new-tokens 0", "at least 1"),
        ("--prompts a=x --generation-batch-size 0", "--generation-batch-size 0: use a whole number of at least 1"),
        ("--prompts a=x --answers a.json --json ./a.json", "--json ./a.json: is the file of --answers"),
        ("--prompts a=x --judge nowhere.py:f", "no such file"),
        ("--prompts a=x --judge f", "write FILE.py:FUNCTION"),
    ],
)
def test_mistakes_in_flags_are_told(flags: str, fault: str) -> None:
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    with pytest.raises(UserError, match=fault):
        Request.of(parser.parse_args(flags.split()))
