"""``megatron-ogpsa data``: rows in the public form of each data set become rows that training reads; the rest is counted."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_ogpsa.cli.main import main
from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.preferences import pair_from_row
from megatron_ogpsa.data.recipes import RECIPES, select

Row = dict[str, Any]


def safer(index: int, safe: tuple[bool, bool], *, better: int = 0, saferer: int | None = None) -> Row:
    """As in PKU-SafeRLHF, which has further fields."""
    return {
        "prompt": f"how do i {index}",
        "response_0": f"first {index}",
        "response_1": f"second {index}",
        "is_response_0_safe": safe[0],
        "is_response_1_safe": safe[1],
        "better_response_id": better,
        "safer_response_id": (0 if safe[0] else 1) if saferer is None else saferer,
        "response_0_sha256": "0" * 64,
    }


SAFERLHF = [
    safer(0, (True, False), better=1),
    safer(1, (False, True)),
    safer(2, (True, True), better=1),
    safer(3, (False, False)),
    safer(1, (False, True)),
    safer(5, (True, False), saferer=1),
]


def feedback(index: int, scores: tuple[float, float] = (9.0, 5.0), **changes: Any) -> Row:
    """As in UltraFeedback, binarized."""

    def talk(answer: str) -> list[Row]:
        return [{"role": "user", "content": f"what is {index}"}, {"role": "assistant", "content": answer}]

    row = {
        "prompt": f"what is {index}",
        "chosen": talk(f"good {index}"),
        "rejected": talk(f"bad {index}"),
        "messages": talk(f"good {index}"),
        "score_chosen": scores[0],
        "score_rejected": scores[1],
    }
    return row | changes


FEEDBACK = [feedback(0), feedback(1, scores=(7.0, 7.0)), feedback(2), feedback(3, chosen=feedback(3)["rejected"])]
FEEDBACK.append(feedback(4, chosen=[{"role": "user", "content": "and then?"}]))

HALUEVAL = [
    {"knowledge": "It opened in 1889.", "question": "When?", "right_answer": "1889", "hallucinated_answer": "1900"},
    {"knowledge": "", "question": "Who?", "right_answer": "Ada", "hallucinated_answer": "Eve"},
    {"knowledge": "None.", "question": "Why?", "right_answer": " ", "hallucinated_answer": "Because."},
]

EXPECTED: dict[str, tuple[list[Row], list[Row], dict[str, int]]] = {
    "saferlhf_sft": (
        SAFERLHF,
        [
            {"messages": [{"role": "user", "content": f"how do i {i}"}, {"role": "assistant", "content": answer}]}
            for i, answer in ((0, "first 0"), (1, "second 1"), (2, "second 2"), (5, "first 5"))
        ],
        {"neither response is safe": 1, "the same as an earlier row": 1},
    ),
    "saferlhf_dpo": (
        SAFERLHF,
        [
            {"prompt": "how do i 0", "chosen": "first 0", "rejected": "second 0"},
            {"prompt": "how do i 1", "chosen": "second 1", "rejected": "first 1"},
        ],
        {
            "both responses are safe": 1,
            "neither response is safe": 1,
            "the same as an earlier row": 1,
            "the safer response is not the safe one": 1,
        },
    ),
    "ultrafeedback_sft": (
        FEEDBACK,
        [{"messages": row["chosen"]} for row in FEEDBACK[:4]],
        {"no answer at the end": 1},
    ),
    "ultrafeedback_dpo": (
        FEEDBACK,
        [
            {"prompt": row["chosen"][:1], "chosen": f"good {i}", "rejected": f"bad {i}"}
            for i, row in ((0, FEEDBACK[0]), (2, FEEDBACK[2]))
        ],
        {"the chosen answer has no higher score": 1, "the answers are the same": 1, "no answer at the end": 1},
    ),
    "halueval_sft": (
        HALUEVAL,
        [
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
            for q, a in (("It opened in 1889.\n\nWhen?", "1889"), ("Who?", "Ada"))
        ],
        {"no question or no answer": 1},
    ),
}

Write = Callable[[list[Row]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Rows to a file as the hub's export has them."""

    def written(rows: list[Row]) -> Path:
        path = tmp_path / "public.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return written


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_become_what_training_reads(
    name: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, expected, dropped = EXPECTED[name]
    out, source = tmp_path / f"out/{name}.jsonl", write(rows)
    given = ["--source", str(source), "--out", str(out), "--num-rows", str(len(expected))]
    assert main(["data", name, *given]) == 0
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, expected))
    read = pair_from_row if name.endswith("_dpo") else messages_from_row
    for number, row in enumerate(written, start=1):
        read(row, f"{out}:{number}")
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"{out}: {len(expected)} of {len(expected)} rows that fit, of {len(rows)} of {source}, seed 0"
    assert sorted(told[1:-1]) == sorted(f"  dropped {number}: {reason}" for reason, number in dropped.items())
    assert told[-1] == f"  licence of the data set: {RECIPES[name].licence}"


def test_the_sample_depends_on_the_seed_alone_and_is_even(write: Write) -> None:
    """Each of 20 rows is among 5 of them in 100 of 400 samples, give or take 4 standard deviations (8.7)."""
    source = str(write([safer(index, (True, False)) for index in range(20)]))
    recipe = RECIPES["saferlhf_dpo"]

    def sample(seed: int) -> list[str]:
        return [row["prompt"] for row in select(recipe, source, num_rows=5, seed=seed).rows]

    assert sample(3) == sample(3) != sample(4)
    taken = [prompt for seed in range(400) for prompt in sample(seed)]
    counts = [taken.count(f"how do i {index}") for index in range(20)]
    assert all(65 <= count <= 135 for count in counts), counts
    firsts = [sample(seed)[0] for seed in range(400)]
    assert len(set(firsts)) == 20


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("saferlhf_sft", {k: v for k, v in SAFERLHF[0].items() if k != "response_1"}, "field 'response_1' is missing"),
        ("saferlhf_sft", SAFERLHF[0] | {"is_response_0_safe": None}, "field 'is_response_0_safe' is null"),
        ("saferlhf_sft", SAFERLHF[0] | {"is_response_0_safe": "yes"}, "'is_response_0_safe' must be true or false"),
        ("saferlhf_dpo", SAFERLHF[0] | {"safer_response_id": 2}, "'safer_response_id' must be 0 or 1, not 2"),
        ("ultrafeedback_sft", feedback(1, chosen="text"), "'chosen' must be a list of messages, not text"),
        ("ultrafeedback_dpo", feedback(1, score_chosen="9"), "'score_chosen' must be a number, not text"),
        ("halueval_sft", {"question": "Who?", "right_answer": "Ada"}, "field 'knowledge' is missing"),
    ],
)
def test_a_row_of_another_kind_is_named(
    name: str, row: Row, words: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write([EXPECTED[name][0][0], row])
    code = main(["data", name, "--source", str(source), "--out", str(tmp_path / "out.jsonl"), "--num-rows", "1"])
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert code == 2
    assert line.startswith(f"megatron-ogpsa: error: {source}:2: {words}")
    assert not (tmp_path / "out.jsonl").exists()


def test_too_few_rows(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(HALUEVAL)
    given = ["--source", str(source), "--out", str(tmp_path / "out.jsonl")]
    assert main(["data", "halueval_sft", *given]) == 2
    assert f"--num-rows 200: of 3 rows of {source} only 2 can be taken" in capsys.readouterr().err
    assert main(["data", "halueval_sft", *given, "--num-rows", "0"]) == 2


def test_published_names_are_looked_up_with_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: what the library is asked for."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*names: str, split: str) -> datasets.Dataset:
        asked.append((*names, split))
        return datasets.Dataset.from_list(HALUEVAL[:1])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    select(RECIPES["halueval_sft"], RECIPES["halueval_sft"].source, num_rows=1, seed=0)
    assert asked == [("pminervini/HaluEval", "qa", "data")]


ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/data.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_write_what_they_say(
    line: str, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a file in the place of the Hub, and fewer rows."""
    monkeypatch.chdir(tmp_path)
    program, *given = shlex.split(line, comments=True)
    name = given[-1]
    assert (program, given[0]) == ("megatron-ogpsa", "data")
    assert f"# {RECIPES[name].num_rows:,} " in line
    assert main([*given, "--source", str(write(EXPECTED[name][0])), "--num-rows", "1"]) == 0
    assert len((tmp_path / f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()) == 1


def test_the_page_has_every_recipe() -> None:
    assert {shlex.split(line, comments=True)[-1] for line in COMMANDS} == RECIPES.keys()
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == RECIPES.keys()
