"""Real agents of one and two nodes: failures, restarts, signals and nodes that do not meet. Ranks import nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.harness.preloaded import PreloadedCommand

ENDED_AT = "rank 3 ended with exit code 1"

CASES: dict[str, dict[str, Any]] = {
    "a rank raises": {
        "nodes": 1,
        "ranks": "last_rank_raises",
        "codes": [1],
        "said": ["ValueError: a message of its own", "rank 1 ended with exit code 1; its output is above"],
    },
    "a rank raises and is started again": {
        "nodes": 1,
        "ranks": "last_rank_raises_once",
        "flags": {"max-restarts": "2"},
        "codes": [0],
        "said": [
            "rank 1 ended with exit code 1; its output is above. All ranks are started again (after that, 1 more times)"
        ],
        "starts": 4,
    },
    "restarts are used up": {
        "nodes": 1,
        "ranks": "last_rank_raises",
        "flags": {"max-restarts": "1"},
        "codes": [1],
        "said": [
            "All ranks are started again (after that, 0 more times)",
            "rank 1 ended with exit code 1; its output is above\n",
        ],
        "starts": 4,
    },
    "ranks may open all the files that the system allows": {
        "nodes": 1,
        "ranks": "tells_how_many_files",
        "codes": [0],
        "said": ["rank 0 may open as many files as it can", "rank 1 may open as many files as it can"],
    },
    "a user's mistake is not tried again": {
        "nodes": 1,
        "ranks": "first_rank_is_misused",
        "flags": {"max-restarts": "3"},
        "codes": [2],
        "said": [],
        "unsaid": "ended with",
        "starts": 2,
    },
    "ranks save after SIGTERM": {
        "nodes": 1,
        "ranks": "saves_when_told",
        "flags": {"max-restarts": "3"},
        "signal": "SIGTERM",
        "codes": [0],
        "said": ["the command was told SIGTERM", "rank 0 has saved", "rank 1 has saved"],
        "starts": 2,
    },
    "Ctrl-C is SIGTERM to the ranks": {
        "nodes": 1,
        "ranks": "saves_when_told",
        "signal": "SIGINT",
        "codes": [0],
        "said": ["rank 0 has saved", "rank 1 has saved"],
    },
    "ranks that do not save die of SIGTERM": {
        "nodes": 1,
        "ranks": "wait",
        "flags": {"max-restarts": "3"},
        "signal": "SIGTERM",
        "codes": [143],
        "said": ["SIGTERM ended the ranks"],
        "starts": 2,
    },
    "ranks that do not end are killed": {
        "nodes": 1,
        "ranks": "ignores_signals",
        "flags": {"shutdown-timeout": "0.5"},
        "signal": "SIGTERM",
        "codes": [143],
        "said": ["SIGTERM ended the ranks"],
    },
    "ranks that are killed take their children with them": {
        "nodes": 1,
        "ranks": "first_rank_has_a_child_and_ignores_signals",
        "flags": {"shutdown-timeout": "0.5"},
        "signal": "SIGTERM",
        "codes": [143],
        "said": ["SIGTERM ended the ranks"],
    },
    "a rank that has died leaves no child, and the others save": {
        "nodes": 1,
        "ranks": "last_rank_has_a_child_and_is_killed",
        "codes": [1],
        "said": ["rank 0 has saved", "rank 1 ended with signal 9"],
    },
    "a killed agent takes its ranks with it": {
        "nodes": 1,
        "ranks": "ignores_signals",
        "signal": "SIGKILL",
        "codes": [-9],
        "said": [],
    },
    "a rank of another node raises": {
        "nodes": 2,
        "ranks": "last_rank_raises",
        "codes": [1, 1],
        "said": ["ValueError: a message of its own", f"{ENDED_AT}; its output is above", f"{ENDED_AT} on "],
    },
    "a rank of another node raises and all are started again": {
        "nodes": 2,
        "ranks": "last_rank_raises_once",
        "flags": {"max-restarts": "1"},
        "codes": [0, 0],
        "said": [f"{ENDED_AT}; its output is above. All ranks are started again"],
        "starts": 8,
    },
    "an agent too many is ended, and restarts are left": {
        "nodes": 2,
        "one too many": True,
        "ranks": "last_rank_raises_once_told",
        "flags": {"max-restarts": "1"},
        "codes": [0, 0],
        "said": ["SIGTERM ended it before its ranks were started", "one too many: 143", "All ranks are started again"],
        "starts": 8,
    },
    "a user's mistake on one node ends the other": {
        "nodes": 2,
        "ranks": "first_rank_is_misused",
        "flags": {"max-restarts": "3"},
        "codes": [2, 2],
        "said": ["rank 0 ended with exit code 2 on "],
        "starts": 4,
    },
    "SIGTERM on one node ends the other": {
        "nodes": 2,
        "ranks": "wait",
        "signal": "SIGTERM",
        "of node": 1,
        "codes": [143, 143],
        "said": ["SIGTERM ended the ranks\n", "SIGTERM ended the ranks on "],
    },
    "the node of the rendezvous is killed": {
        "nodes": 2,
        "ranks": "wait",
        "signal": "SIGKILL",
        "codes": [-9, 1],
        "said": ["the node that holds the rendezvous, 127.0.0.1:", "is gone"],
    },
    "a node is missing": {
        "nodes": 2,
        "started": 1,
        "ranks": "wait",
        "flags": {"rdzv-timeout": "4"},
        "codes": [1],
        "said": ["fewer than 2 nodes have met at 127.0.0.1:", "within 4 s"],
        "starts": 0,
    },
    "the port is taken": {
        "nodes": 2,
        "started": 1,
        "port is taken": True,
        "ranks": "wait",
        "codes": [1],
        "said": ["cannot hold the rendezvous at 127.0.0.1:", "Then set MASTER_PORT"],
        "starts": 0,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_agents(preloaded: PreloadedCommand, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    finished = preloaded.run("tests.cluster.agents", [json.dumps(case)], folder=tmp_path, timeout=90)
    assert finished.exit_code == 0, finished.output
    codes = [line.partition(": ")[2] for line in finished.output.splitlines() if line.startswith("node ")]
    assert codes == [str(code) for code in case["codes"]], finished.output
    for text in case["said"]:
        assert text in finished.output, finished.output
    if "unsaid" in case:
        assert case["unsaid"] not in finished.output, finished.output
    if "starts" in case:
        assert finished.output.count(" starts\n") == case["starts"], finished.output
    assert "torch/distributed" not in finished.output, finished.output  # no traceback of the agent's
    left = [int(path.read_text(encoding="utf-8")) for path in tmp_path.glob("ready-*")]
    assert_ended(left)


def assert_ended(process_ids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while alive := [pid for pid in process_ids if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"ranks {alive} have outlived their agent"
        time.sleep(0.05)
