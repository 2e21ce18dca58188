"""Data that takes longer to be tokenized than ranks may stand in a collective: one rank works, the others wait for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ogpsa.integration.inputs.datasets import DATA_FOLDER
from tests.harness import WorkerGroup
from tests.integration.conftest import Train

Distributed = Callable[[int], WorkerGroup]
CASES = "tests.integration.turn_cases"
TIMEOUT = 4
ONE_STEP = ("--train-iters", "1", "--ogpsa-hang-timeout", str(TIMEOUT))


@pytest.mark.parametrize("given", ["--data-cache-path", "--save"])
def test_a_run_waits_longer_than_the_watch_over_hangs_allows(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    """And tokenizes once for all ranks, and for the run that goes on from it, which reads what is kept."""
    monkeypatch.setenv("SECONDS", str(2.5 * TIMEOUT))
    flags = [*ONE_STEP, given, "kept", "--nproc-per-node", "2", "--pipeline-model-parallel-size", "1"]
    for _ in range(2):
        outcome = train(*flags, module="tests.integration.slow_tokenizing")
        assert outcome.exit_code == 0, outcome.output[-3000:]
        assert (tmp_path / "tokenized").read_text(encoding="utf-8") == "rank 0\n"
    folder = tmp_path / "kept" / (DATA_FOLDER if given == "--save" else "")
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["chat", "chat"]


def test_who_waits_stands_in_no_collective_and_gives_signs_of_life(distributed: Distributed) -> None:
    for seen in distributed(2).run(f"{CASES}:waiting"):
        assert seen["result"] == "found"
        assert seen["collectives"] == []
    assert seen["pulses"] >= 3


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("user", "UserError: data.jsonl:3: broken (on rank 0)"),
        ("internal", "RuntimeError: rank 0 failed: KeyError: 'lost'"),
    ],
)
def test_a_failure_of_who_works_is_raised_by_all(distributed: Distributed, failure: str, expected: str) -> None:
    for seen in distributed(2).run(f"{CASES}:waiting", failure=failure):
        assert seen["result"] == expected


def test_a_worker_that_is_lost_is_not_waited_for_without_end(distributed: Distributed) -> None:
    away, told = distributed(2).run(f"{CASES}:lost_worker")
    assert away == "away"
    assert re.fullmatch(
        r"rank 0 has given no sign of life for \d s while the others wait for it \(a long work\): it is frozen or lost",
        told,
    )


@pytest.fixture
def chats(tmp_path: Path) -> Callable[[str, int], None]:
    def write(folder: str, number: int) -> None:
        (tmp_path / folder).mkdir()
        chats = [
            [{"role": "user", "content": f"what is {i}"}, {"role": "assistant", "content": f"it is {i}"}]
            for i in range(number)
        ]
        lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (tmp_path / folder / "chats.jsonl").write_text(lines, encoding="utf-8")

    return write


@pytest.mark.parametrize("places", [["shared", "shared", "shared"], ["a", "b", "b"]])
def test_only_who_tokenizes_reads_the_source(
    distributed: Distributed, chats: Callable[[str, int], None], tmp_path: Path, inputs: Path, places: list[str]
) -> None:
    """Rank 0, and where what it builds is not seen, one rank of each other node."""
    chats("one", 20)
    seen = distributed(3).run(
        f"{CASES}:load",
        tokenizer=str(inputs / "tokenizer"),
        source="chats.jsonl",
        folder=str(tmp_path),
        places=places,
        copies=["one"] * 3,
    )
    assert len({(rank["result"], rank["supervised"]) for rank in seen}) == 1
    assert re.fullmatch("[0-9a-f]{64}", seen[0]["result"])
    assert seen[0]["supervised"] > 0
    assert [rank["hashed"] for rank in seen] == ([1, 0, 0] if places[0] == "shared" else [1, 1, 0])


def test_nodes_with_other_data_are_told(
    distributed: Distributed, chats: Callable[[str, int], None], tmp_path: Path, inputs: Path
) -> None:
    chats("one", 20)
    chats("two", 21)
    seen = distributed(2).run(
        f"{CASES}:load",
        tokenizer=str(inputs / "tokenizer"),
        source="chats.jsonl",
        folder=str(tmp_path),
        places=["a", "b"],
        copies=["one", "two"],
    )
    for rank in seen:
        assert rank["result"].startswith("chats.jsonl: has other content on this node than on rank 0's; copy it anew")
