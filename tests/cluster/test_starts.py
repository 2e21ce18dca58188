"""What a rank learns from its environment, and what it is given: by torchrun, by a pod, for CUDA."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.api import RendezvousHandler

from megatron_ogpsa.cli import evaluate, train
from megatron_ogpsa.cli.connections import VARIABLE, set_connections
from megatron_ogpsa.cluster import node
from megatron_ogpsa.cluster.settings import MANY_NODES_VARIABLE, LaunchSettings
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.processes import PARENT_VARIABLE, is_rank, require_common_count

REFUSED = {
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "GROUP_WORLD_SIZE": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
MESSAGE = r"--max-restarts 3.* 2 nodes.*TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 exported.*launch/train_nodes\.sh"


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in REFUSED.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("refused")
def test_ranks_that_would_count_differently_are_refused() -> None:
    with pytest.raises(UserError, match=MESSAGE):
        require_common_count()


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),  # each start has a store of its own
        ("TORCHELASTIC_USE_AGENT_STORE", None),  # another launcher
        ("GROUP_WORLD_SIZE", "1"),
        ("TORCHELASTIC_MAX_RESTARTS", "0"),
    ],
)
def test_others_are_not(monkeypatch: pytest.MonkeyPatch, name: str, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    require_common_count()


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("text", ["lr: 1.0e-5\n", "save: out\nstages:\n  sft:\n    lr: 1.0e-5\n"])
def test_the_command_looks_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    """A single run, and the ranks of a pipeline's job."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    monkeypatch.setattr(train, "_run_as_rank", lambda *_: pytest.fail("it went on"))
    with pytest.raises(UserError, match=MESSAGE):
        train.run(parser.parse_args([str(config)]))


def test_a_pods_variables_are_not_a_ranks() -> None:
    """Kubeflow's PyTorchJob sets RANK and WORLD_SIZE in each pod, which then is to start its ranks."""
    pod = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0"}
    assert not is_rank({})
    assert is_rank(pod | {"LOCAL_RANK": "0"})
    with pytest.raises(
        UserError, match=r"^RANK 1 and WORLD_SIZE 4 .* NODE_RANK and NNODES.* unset RANK and WORLD_SIZE"
    ):
        is_rank(pod)


TASK = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
"""What enroot's hook sets in a container for PyTorch, for the second of two nodes with one task each."""

TASKS = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
TORCHRUN = TASK | {"LOCAL_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "a"}
UNSET = r"env -u RANK -u LOCAL_RANK -u WORLD_SIZE; if this is to be one of them, leave"

NOT_MEANT: dict[str, tuple[str, str, dict[str, str], str]] = {
    "a flag": (
        "",
        "--nproc-per-node 8",
        TASK,
        rf"^--nproc-per-node 8: RANK=1, LOCAL_RANK=0, WORLD_SIZE=2 .*{UNSET} the",
    ),
    "a flag of a script": ("", "--nnodes 1", TASK, rf"^--nnodes 1: RANK=1.*{UNSET} the flags out$"),
    "the file": ("{nproc-per-node: 8}", "", TASK, rf"^launch.nproc-per-node 8: RANK=1.*{UNSET} it out$"),
    "the file, and as many nodes": ("{nproc-per-node: 2}", "", TASK | TASKS, r"^launch.nproc-per-node 2: "),
    "the file, with fewer than there are": (
        "{nproc-per-node: 1}",
        "",
        TASK | {"LOCAL_RANK": "1"},
        "^launch.nproc-per-node 1",
    ),
    "all GPUs": ("{nproc-per-node: gpu}", "", TASK | TASKS, r"^launch.nproc-per-node gpu: "),
    "the script of many nodes": (
        "",
        "",
        TASK | {MANY_NODES_VARIABLE: "1"},
        rf"^launch/train_nodes.sh: RANK=1.*{UNSET} the",
    ),
    "a flag behind torchrun": (
        "",
        "--nproc-per-node 8",
        TORCHRUN,
        "^--nproc-per-node 8: torchrun has started this rank",
    ),
}

MEANT: dict[str, tuple[str, dict[str, str]]] = {
    "nothing is said": ("", TASK),
    "a task a GPU": ("{nproc-per-node: 2}", TASK | TASKS | {"SLURM_STEP_NUM_NODES": "1"}),
    "a task a GPU, each of which sees all": (
        "{nproc-per-node: gpu}",
        TASK | {"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"},
    ),
    "another launcher within one task": ("{nproc-per-node: 2}", TASK | TASKS | {"SLURM_STEP_NUM_TASKS": "1"}),
    "torchrun, by the script": ("", TORCHRUN | {MANY_NODES_VARIABLE: "1"}),
    "torchrun": ("{nproc-per-node: 8}", TORCHRUN),
    "this command": ("{nproc-per-node: 8}", TASK | {"LOCAL_WORLD_SIZE": "1", PARENT_VARIABLE: "1"}),
}


def run_as(
    environment: dict[str, str], verb: str, text: str, flags: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command as a rank that is told nothing, with 8 GPUs, until it begins with its work."""
    for name in {*TORCHRUN, *TASKS, PARENT_VARIABLE, MANY_NODES_VARIABLE}:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    config = folder / "run.yaml"
    config.write_text("lr: 1.0\n" + (f"launch: {text}\n" if text else ""), encoding="utf-8")
    module = {"train": train, "evaluate": evaluate}[verb]
    monkeypatch.setattr(module, "end_with_starter", lambda: None)
    monkeypatch.setattr(module, "_run_as_rank", lambda *_: 0)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    assert module.run(parser.parse_args([str(config), *flags.split()])) == 0


@pytest.mark.parametrize("verb", ["train", "evaluate"])
@pytest.mark.parametrize("case", NOT_MEANT)
def test_what_was_to_start_ranks_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, case: str) -> None:
    """It trained with one rank a node, and ended with 0."""
    text, flags, environment, expected = NOT_MEANT[case]
    with pytest.raises(UserError, match=expected):
        run_as(environment, verb, text, flags, tmp_path, monkeypatch)


@pytest.mark.parametrize("case", MEANT)
def test_ranks_that_others_have_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    text, environment = MEANT[case]
    run_as(environment, "train", text, "", tmp_path, monkeypatch)


def test_ranks_share_the_cores_that_the_command_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container or taskset gives it fewer than there are."""

    def is_alone(settings: LaunchSettings) -> RendezvousHandler:
        raise node._NotMetError("no rank is to be started")

    monkeypatch.setenv("OMP_NUM_THREADS", "")  # put back afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    monkeypatch.setattr(node, "_join", is_alone)
    assert node.run_node(["true"], LaunchSettings(ranks_per_node="2")) == 1
    assert os.environ["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("tensor-model-parallel-size: 2\n", [], "1"),
        ("tensor-model-parallel-size: 2\n", ["--tensor-model-parallel-size=1"], None),
        ("lr: 1.0\n", ["--context-parallel-size", "2"], "1"),
        ("save: out\nstages:\n  sft:\n    tensor-model-parallel-size: 2\n", [], "1"),
        ("tensor-model-parallel-size: 2\nuse-megatron-fsdp: true\n", [], None),
        ("tensor-model-parallel-size: 2\nuse-megatron-fsdp: false\n", [], "1"),
        ("lr: 1.0\n", [], None),
    ],
)
def test_ranks_of_split_tensors_and_sequences_have_one_queue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, flags: list[str], expected: str | None
) -> None:
    """Up to Hopper Megatron refuses to start without it, and the configurations are to run as they are."""
    monkeypatch.setenv(VARIABLE, "")  # put back afterwards
    monkeypatch.delenv(VARIABLE)
    config = tmp_path / "run.yaml"
    config.write_text(text, encoding="utf-8")
    set_connections(ConfigFile.read(config), flags)
    assert os.environ.get(VARIABLE) == expected
    os.environ[VARIABLE] = "8"
    set_connections(ConfigFile.read(config), flags)
    assert os.environ[VARIABLE] == "8"
