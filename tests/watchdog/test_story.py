"""Who is behind, decided from records that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_ogpsa.watchdog.story import Record, Suspect, story, suspects

ALL_REDUCE = "all_reduce"


def record(rank: int, beat: int = 9, **changes: object) -> Record:
    """A rank that waits in an all-reduce of step 7."""
    waiting = Record(
        rank=rank,
        host=f"node{rank // 2}",
        pid=100 + rank,
        beat=beat,
        told_at=1000.0,
        step=7,
        phase="step",
        line="megatron/core/optimizer/clip_grads.py:130",
        collective=ALL_REDUCE,
        standing=30.0,
    )
    return replace(waiting, **changes)  # type: ignore[arg-type]


def four(**changes: dict[str, object]) -> dict[int, Record]:
    """Four ranks, all waiting but for what ``rank1={...}`` changes; a record that is ``{"beat": None}`` is not there."""
    records = {rank: record(rank, **changes.get(f"rank{rank}", {})) for rank in range(4)}  # type: ignore[arg-type]
    return {rank: told for rank, told in records.items() if told.beat is not None}


COMPUTES = {"collective": None, "line": "train.py:3"}
GONE = {"beat": None}
LEFT = {"has_left": True, "collective": None}

CASES = {  # what has changed of each rank's record at the second look, beside the beats of all; then who is suspected
    "one is silent": ({"rank2": {"beat": 8}}, [(2, "silent")]),
    "a silent one that computed": ({"rank2": {"beat": 8} | COMPUTES}, [(2, "silent")]),
    "two are silent": ({"rank0": {"beat": 8}, "rank3": {"beat": 8}}, [(0, "silent"), (3, "silent")]),
    "one computes": ({"rank1": COMPUTES}, [(1, "busy")]),
    "one is silent, and another one computes": ({"rank1": COMPUTES, "rank2": {"beat": 8}}, [(2, "silent")]),
    "one was never there": ({"rank3": GONE}, [(3, "unheard")]),
    "one has left": ({"rank3": LEFT}, [(3, "left")]),
    "one has left, which tells no more": ({"rank3": LEFT | {"beat": 8}}, [(3, "left")]),
    "all wait": ({}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_behind(case: str) -> None:
    changes, expected = CASES[case]
    before = {rank: record(rank, beat=8) for rank in range(4) if changes.get(f"rank{rank}") != GONE}
    assert [(found.rank, found.kind) for found in suspects(before, four(**changes), 4)] == expected


def test_a_rank_that_appears_between_two_looks_is_alive() -> None:
    before = {rank: record(rank, beat=8) for rank in range(3)}
    assert suspects(before, four(), 4) == []


STORIES = {  # suspects of rank 0's; then what the line says after "rank 0 … :"
    "silent": (
        [Suspect(2, "silent", record(2, told_at=966.0, phase="refresh", line="megatron_ogpsa/collectives.py:19"))],
        "rank 2 (host node1, pid 102) is frozen or lost: it has not been heard of for 34 s and was last seen at step 7 "
        "(refresh) in all_reduce (megatron_ogpsa/collectives.py:19)",
    ),
    "busy": (
        [Suspect(1, "busy", record(1, collective=None, line="train.py:3"))],
        "rank 1 (host node0, pid 101) is alive and computes at step 7 in train.py:3, for 30 s. If it is to take so long: "
        "raise --ogpsa-hang-timeout and --distributed-timeout-minutes",
    ),
    "unheard": ([Suspect(3, "unheard", None)], "rank 3 has never been heard of: it has hung or ended at start"),
    "left": (
        [Suspect(3, "left", record(3, collective=None, has_left=True, step=None, line="train.py:9"))],
        "rank 3 (host node1, pid 103) has left the run, last seen at start in train.py:9",
    ),
}


@pytest.mark.parametrize("kind", STORIES)
def test_the_line_names_ranks_steps_and_collectives(kind: str) -> None:
    found, expected = STORIES[kind]
    waits = (
        "rank 0 (host node0, pid 100) has waited for 30 s at step 7 in all_reduce "
        "(megatron/core/optimizer/clip_grads.py:130): "
    )
    assert story(record(0), found, four(), now=1000.0) == waits + expected


def test_of_many_only_the_first_are_described() -> None:
    found = [Suspect(rank, "silent", record(rank)) for rank in range(1, 8)]
    line = story(record(0), found, {}, now=1000.0)
    assert line.count("is frozen or lost") == 4
    assert line.endswith("; and so of ranks 5, 6, 7")


def test_ranks_that_wait_for_each_other_are_told_by_place() -> None:
    records = four(rank3={"collective": "barrier", "line": "save.py:1"})
    assert story(record(0), [], records, now=1000.0).endswith(
        "they wait for each other: ranks 0, 1, 2 at step 7 in all_reduce (megatron/core/optimizer/clip_grads.py:130); "
        "rank 3 at step 7 in barrier (save.py:1)"
    )


def test_a_record_survives_the_store() -> None:
    assert Record.from_json(record(1).to_json()) == record(1)
