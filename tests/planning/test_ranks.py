"""Clusters that are not there: each element counts once, and a step sends what it sent before."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.planning import costs
from tests.core import oracle
from tests.planning.collectives import REFERENCES
from tests.planning.every_rank import all_ranks, faults, processes
from tests.planning.worlds import THOUSAND, WORLDS

ROOT = Path(__file__).parents[2]
SENDING = ("tp8-pp8-dp16", "ep16-etp1-tp4-pp8")


@pytest.fixture(scope="module")
def clusters() -> dict[str, list[Any]]:
    """All ranks of all small clusters."""
    with processes(2) as pool:
        return {name: all_ranks(world, pool, parts=2) for name, world in WORLDS.items()}


@pytest.mark.parametrize("world", WORLDS)
def test_each_element_counts_once_in_each_group_that_sums(clusters: dict[str, list[Any]], world: str) -> None:
    assert len(clusters[world]) == WORLDS[world].size
    assert list(faults(clusters[world], WORLDS[world].shape)) == []


def test_sinks_are_told_to_be_split(clusters: dict[str, list[Any]]) -> None:
    """Megatron does not mark them; the page would call them copies."""
    parameters = [parameter for rank in clusters["tp4-pp4-vpp2-tied-plain"] for parameter in rank.parameters]
    sinks = [parameter for parameter in parameters if parameter.name.endswith(".softmax_offset")]
    assert len(sinks) == 2 * len(clusters["tp4-pp4-vpp2-tied-plain"])  # a layer for each virtual stage
    assert {(sink.split_dim, sink.num_shares, sink.numel) for sink in sinks} == {(0, 4, 4)}


@pytest.mark.parametrize("mistake", ["counted twice", "not counted", "shifted", "of another block"])
def test_a_single_wrong_piece_of_a_single_rank_is_found(clusters: dict[str, list[Any]], mistake: str) -> None:
    ranks = list(clusters["tp4-pp2-dp4"])
    index = 5  # tensor-parallel rank 1: holds copies that do not count
    piece = next(
        number
        for number, piece in enumerate(ranks[index].pieces)
        if piece.counted == (mistake != "counted twice") and piece.stop > piece.start
    )
    pieces = list(ranks[index].pieces)
    pieces[piece] = {
        "counted twice": lambda p: replace(p, counted=True),
        "not counted": lambda p: replace(p, counted=False),
        "shifted": lambda p: replace(p, start=p.start + 1, stop=p.stop + 1),
        "of another block": lambda p: replace(p, runs=(("decoder.final_layernorm.weight", p.stop - p.start),)),
    }[mistake](pieces[piece])
    ranks[index] = replace(ranks[index], pieces=tuple(pieces))
    assert list(faults(ranks, WORLDS["tp4-pp2-dp4"].shape))


@pytest.fixture(scope="module")
def sent() -> dict[str, dict[str, Any]]:
    """What three ranks of each world send, by space and rank; each world in a process of its own, side by side."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.planning.collectives"]
    started = {
        world: subprocess.Popen([*command, world, "0", "517", "1023"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for world in SENDING
    }
    try:
        told = {world: process.communicate(timeout=400)[0] for world, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    assert [process.returncode for process in started.values()] == [0] * len(SENDING)  # what failed is on stderr
    return {world: json.loads(text) for world, text in told.items()}


@pytest.mark.parametrize("world", SENDING)
def test_what_a_rank_of_1024_sends(sent: dict[str, dict[str, Any]], world: str) -> None:
    """Bytes as ``plan`` tells them; of the blocks of that rank, since no other is there to name more."""
    for space, ranks in sent[world].items():
        for result in ranks.values():
            projection = costs.Projection(
                references=REFERENCES,
                basis_bytes=4,
                on_host=False,
                of_update=space == "update",
                blocks=result["blocks"],
            )
            sizes = [costs.step_message(projection)]
            if space == "update":  # and before the step, the norm of each block and one number of the basis
                sizes.append(8 * (result["blocks"] + 1))
            # Ours stand in the place of all that Megatron needs for the norm.
            assert {name for name, *_ in result["plain"]} == {"all_reduce"}
            expected = sorted(["all_reduce", size, count] for size, count in Counter(sizes).items())
            assert result["projected"] == expected
            first, second = result["refreshes"]
            assert first == [["all_reduce", 8 * result["blocks"] * REFERENCES**2, 1]]
            assert second == [["all_reduce", costs.refresh_message(projection), 1]]


def test_the_kept_output_is_of_these_clusters_of_1024() -> None:
    """What ``python -m tests.planning.every_rank`` printed: no fault, and the model's number of elements in all."""
    kept = json.loads((ROOT / "docs/every_rank.json").read_text(encoding="utf-8"))["worlds"]
    assert [*kept] == [*THOUSAND]
    for name, found in kept.items():
        assert found["ranks"] == THOUSAND[name].size
        assert found["faults"] == []
        shapes = oracle.shapes_of(THOUSAND[name].shape).values()
        assert found["counted_elements"] == found["groups_that_sum"] * sum(map(math.prod, shapes))
