"""Where settings of a launch come from, what wins, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_ogpsa.cluster.settings import FLAGS, MANY_NODES_VARIABLE, launch_settings
from megatron_ogpsa.cluster.slurm import host_names
from megatron_ogpsa.cluster.value import Value
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError

TWO = {"NNODES": "2", "MASTER_ADDR": "node0"}
STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_NNODES": "4",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_NODEID": "2",
}

RESOLVED: dict[str, tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, Any]]] = {
    "nothing is given": ({}, {}, {}, {"ranks_per_node": "1", "max_nodes": 1, "endpoint": "localhost:0"}),
    "the file": ({}, {"nproc-per-node": "8"}, {}, {"ranks_per_node": "8"}),
    "a flag wins over the file": ({"nproc-per-node": "gpu"}, {"nproc-per-node": "8"}, {}, {"ranks_per_node": "gpu"}),
    "the environment": ({}, {}, TWO | {"NODE_RANK": "1"}, {"min_nodes": 2, "max_nodes": 2, "node_rank": 1}),
    "torchrun's port": ({}, {}, TWO, {"endpoint": "node0:29500", "node_rank": None, "run_id": "megatron-ogpsa"}),
    "MASTER_PORT": ({}, {}, TWO | {"MASTER_PORT": "4000"}, {"endpoint": "node0:4000"}),
    "the endpoint's own port": ({"rdzv-endpoint": "n:5000"}, {}, TWO | {"MASTER_PORT": "4"}, {"endpoint": "n:5000"}),
    "an IPv6 endpoint": ({"rdzv-endpoint": "[fe80::1]:5000"}, {}, TWO, {"endpoint": "[fe80::1]:5000"}),
    "the environment wins over the file": ({}, {"nnodes": "8"}, TWO, {"max_nodes": 2}),
    "a flag wins over the environment": ({"nnodes": "1"}, {}, TWO, {"max_nodes": 1, "endpoint": "localhost:0"}),
    "a range": ({"nnodes": "2:4"}, {}, TWO, {"min_nodes": 2, "max_nodes": 4}),
    "MASTER_ADDR of other programs": ({}, {}, {"MASTER_ADDR": "node0"}, {"endpoint": "localhost:0"}),
    "SLURM": (
        {},
        {},
        STEP,
        {
            "max_nodes": 4,
            "node_rank": 2,
            "endpoint": "gpu007:24567",
            "run_id": "slurm-1234567.0",
        },
    ),
    "MASTER_PORT within SLURM": ({}, {}, STEP | {"MASTER_PORT": "4000"}, {"endpoint": "gpu007:4000"}),
    "a step of one node": ({}, {}, STEP | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, {"max_nodes": 1}),
    "a range that the step is in": ({}, {"nnodes": "2:8"}, STEP, {"min_nodes": 2, "max_nodes": 8}),
    "one node of a step": ({"nnodes": "1"}, {}, STEP, {"max_nodes": 1}),
    "one node of an allocation": ({"nnodes": "1"}, {}, {"SLURM_JOB_ID": "1", "SLURM_NNODES": "4"}, {"max_nodes": 1}),
    "one node of several pods": ({}, {}, {"NNODES": "1", "NODE_RANK": "3"}, {"max_nodes": 1, "node_rank": None}),
    "one of many nodes, by a flag": ({"nnodes": "1"}, {}, {MANY_NODES_VARIABLE: "1"}, {"max_nodes": 1}),
    "many nodes, by the file": ({}, {"nnodes": "2"}, {MANY_NODES_VARIABLE: "1", "MASTER_ADDR": "n"}, {"max_nodes": 2}),
    "times": (
        {"rdzv-timeout": "60", "monitor-interval": "5", "shutdown-timeout": "1.5", "max-restarts": "3"},
        {},
        {},
        {"rdzv_timeout": 60, "monitor_interval": 5.0, "shutdown_timeout": 1.5, "max_restarts": 3},
    ),
}


@pytest.mark.parametrize("case", RESOLVED)
def test_resolved(case: str) -> None:
    flags, file, environment, expected = RESOLVED[case]
    settings = launch_settings(flags, file, environment)
    assert {name: getattr(settings, name) for name in expected} == expected


REFUSED: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "no place to meet": ({}, {"NNODES": "2"}, "NNODES says 2 nodes, but not where they meet: set MASTER_ADDR"),
    "no place, by a flag": ({"nnodes": "1:2"}, {}, "--nnodes says 1:2 nodes, but not where they meet"),
    "not a number": ({}, {"NNODES": "two"}, "NNODES two: write a number of nodes, or MIN:MAX"),
    "an upside-down range": ({"nnodes": "4:2"}, TWO, "--nnodes 4:2: use 1 or more"),
    "no nodes": ({"nnodes": "0"}, TWO, "--nnodes 0: use 1 or more"),
    "a node too many": ({}, TWO | {"NODE_RANK": "2"}, "NODE_RANK 2: nodes are counted from 0, and NNODES is 2"),
    "a node of nothing": (
        {},
        {"NODE_RANK": "1"},
        "NODE_RANK 1: nodes are counted from 0, and there is one node: set NNODES",
    ),
    "a negative node": ({"node-rank": "-1"}, TWO, "--node-rank -1: use 0 or more"),
    "a bad endpoint": ({"rdzv-endpoint": "a:b:c"}, TWO, "--rdzv-endpoint a:b:c: write HOST or HOST:PORT"),
    "a bad port": ({}, TWO | {"MASTER_PORT": "http"}, "MASTER_PORT http: use 1 or more"),
    "a port too high": ({}, TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT 70000: ports end at 65535"),
    "no ranks": ({"nproc-per-node": "0"}, {}, "--nproc-per-node 0: use 1 or more, gpu or auto"),
    "no restarts": ({"max-restarts": "some"}, {}, "--max-restarts some: use 0 or more"),
    "no time": ({"shutdown-timeout": "0"}, {}, "--shutdown-timeout 0: write seconds, more than 0"),
    "endless": ({"monitor-interval": "inf"}, {}, "--monitor-interval inf: write seconds"),
    "several tasks on a node": (
        {},
        STEP | {"SLURM_STEP_NUM_TASKS": "32"},
        "SLURM has started 32 of this command on 4 nodes (SLURM_STEP_NUM_TASKS, SLURM_STEP_NUM_NODES)",
    ),
    "SLURM against NNODES": (
        {},
        STEP | {"NNODES": "2"},
        "NNODES 2: srun has started this on 4 nodes (SLURM_STEP_NUM_NODES)",
    ),
    "without srun": (
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NNODES": "4"},
        "SLURM has given this job 4 nodes (SLURM_NNODES), but the command was started on one of them",
    ),
    "the script of many nodes": (
        {},
        {MANY_NODES_VARIABLE: "1"},
        "NNODES is not set: give the number of nodes, by it, --nnodes or launch.nnodes in the configuration, or use ",
    ),
    "not SLURM's list": (
        {},
        STEP | {"SLURM_STEP_NODELIST": "gpu[1-"},
        "SLURM_STEP_NODELIST gpu[1-: not a list of nodes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    flags, environment, expected = REFUSED[case]
    with pytest.raises(UserError) as raised:
        launch_settings(flags, {}, environment)
    assert str(raised.value).startswith(expected)
    assert "\n" not in str(raised.value)


def test_runs_that_differ_have_names_that_do(tmp_path: Path) -> None:
    """Otherwise nodes of one would join the other's at the same host and port."""
    names = []
    for text in ("lr: 1.0\n", "lr: 2.0\n", "lr: 1.0\nstages:\n  sft:\n    lr: 2.0\n"):
        path = tmp_path / f"{len(names)}.yaml"
        path.write_text(text, encoding="utf-8")
        names.append(ConfigFile.read(path).run_id)
    assert len(set(names)) == 3
    assert launch_settings({}, {}, TWO, run_id=names[0]).run_id == names[0]
    assert launch_settings({}, {}, STEP, run_id=names[0]).run_id == "slurm-1234567.0"


HOSTS = {
    "login1": ["login1"],
    "a,b,c": ["a", "b", "c"],
    "node[001-003,007],login1": ["node001", "node002", "node003", "node007", "login1"],
    "n[8-11]": ["n8", "n9", "n10", "n11"],
    "rack[1-2]node[01-02]": ["rack1node01", "rack1node02", "rack2node01", "rack2node02"],
    "n[1,3]-ib,m2": ["n1-ib", "n3-ib", "m2"],
    "a-b.example.org": ["a-b.example.org"],
}


@pytest.mark.parametrize("compact", HOSTS)
def test_slurms_lists_of_nodes(compact: str) -> None:
    assert host_names(Value(compact, "SLURM_STEP_NODELIST")) == HOSTS[compact]


@pytest.mark.parametrize("compact", ["", "n[1-", "n1]", "n[a-b]", "n[]", ",", "n[1-3"])
def test_what_is_no_list_of_nodes(compact: str) -> None:
    with pytest.raises(UserError, match="not a list of nodes as SLURM writes it"):
        host_names(Value(compact, "SLURM_STEP_NODELIST"))


LAUNCH = {
    "{nproc-per-node: 8, nnodes: 2:4}": {"nproc-per-node": "8", "nnodes": "2:4"},  # in base 60 it would be 124
    "{nproc_per_node: gpu, max-restarts: 3}": {"nproc-per-node": "gpu", "max-restarts": "3"},
}


@pytest.mark.parametrize("text", LAUNCH)
def test_the_files_launch_is_taken_as_written(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"launch: {text}\nlr: 1.0\n", encoding="utf-8")
    assert ConfigFile.read(path).launch == LAUNCH[text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", ":2: launch: write a mapping"),
        ("{nproc-per-node: [1, 2]}", ":2: launch: write a mapping"),
        ("{nproc-per-nod: 8}", ":2: launch: unknown key 'nproc-per-nod', did you mean nproc-per-node?"),
        ("{ranks: 8}", ":2: launch: unknown key 'ranks': known are nproc-per-node, nnodes,"),
        ("{node-rank: 0}", ":2: launch: node-rank is each node's own: give --node-rank there"),
    ],
)
def test_mistakes_in_the_files_launch(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"lr: 1.0\nlaunch: {text}\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        ConfigFile.read(path)
    assert str(raised.value).startswith(f"{path}{expected}")


def test_no_flag_of_a_launch_is_one_of_megatrons() -> None:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    assert not {f"--{key}" for key in FLAGS} & set(build_parser()._option_string_actions)
