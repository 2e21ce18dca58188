"""The scripts for training pass on what they are given, to the command or to SLURM's ``srun``."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ogpsa.cluster.settings import MANY_NODES_VARIABLE
from tests.launch.sandbox import Sandbox

SRUN = 'printf "ran srun"; printf " <%s>" "$@"'

RUNS = {
    "one node": ("train.sh", {}, "ran megatron-ogpsa <train> <--nnodes> <1> <a b.yaml> <--lr> <1>"),
    "one of many nodes": ("train_nodes.sh", {"NNODES": "2:4"}, "ran megatron-ogpsa <train> <a b.yaml> <--lr> <1>"),
    "a node of SLURM": (
        "train_nodes.sh",
        {"SLURM_STEP_NUM_NODES": "2"},
        "ran megatron-ogpsa <train> <a b.yaml> <--lr> <1>",
    ),
}


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    sandbox = Sandbox(tmp_path)
    sandbox.add_python(sandbox.tools / "python3.12")
    return sandbox


@pytest.mark.parametrize("case", RUNS)
def test_what_the_command_is_given(sandbox: Sandbox, case: str) -> None:
    script, environment, expected = RUNS[case]
    result = sandbox.run(sandbox.script(script), "a b.yaml", "--lr", "1", **environment)
    assert result.stdout == expected, result.stderr
    assert result.returncode == 0
    assert len(sandbox.installations()) == 1


@pytest.mark.parametrize(
    ("script", "expected"), [("train.sh", "unset"), ("train_nodes.sh", "unset"), ("demo.sh", "1"), ("laptop.sh", "1")]
)
def test_the_command_shares_out_the_cores_itself(sandbox: Sandbox, script: str, expected: str) -> None:
    """A variable that is set wins over the command, which leaves the demo and its like to the scripts."""
    sandbox.run(sandbox.script("demo.sh"))
    command = sandbox.venv / "bin" / "megatron-ogpsa"
    command.write_text('#!/usr/bin/env bash\necho "${OMP_NUM_THREADS:-unset}"\n', encoding="utf-8")
    assert sandbox.run(sandbox.script(script), "a.yaml", NNODES="1").stdout == f"{expected}\n"
    assert sandbox.run(sandbox.script(script), "a.yaml", NNODES="1", OMP_NUM_THREADS="3").stdout == "3\n"


@pytest.mark.parametrize(("script", "is_told"), [("train.sh", False), ("train_nodes.sh", True)])
def test_the_command_is_told_that_there_are_many_nodes(sandbox: Sandbox, script: str, is_told: bool) -> None:
    """It reads the file, wherever among the flags that stands and however it is written, and refuses without a number."""
    sandbox.run(sandbox.script("demo.sh"))
    (sandbox.venv / "bin" / "megatron-ogpsa").write_text(
        '#!/usr/bin/env bash\nenv; printf "<%s>" "$@"\n', encoding="utf-8"
    )
    told = sandbox.run(sandbox.script(script), "--nproc-per-node", "8", "a.yaml").stdout.splitlines()
    assert (f"{MANY_NODES_VARIABLE}=1" in told) == is_told
    assert told[-1].endswith("<--nproc-per-node><8><a.yaml>")


def test_slurm_installs_once_and_starts_the_script_of_the_nodes(sandbox: Sandbox, tmp_path: Path) -> None:
    """SLURM runs a copy of the batch script, from elsewhere."""
    sandbox.add_command("srun", SRUN)
    copy = tmp_path / "slurm_script"
    copy.write_bytes(sandbox.script("slurm.sbatch").read_bytes())
    result = sandbox.run(copy, "a b.yaml", SLURM_SUBMIT_DIR=str(sandbox.project))
    nodes = sandbox.script("train_nodes.sh")
    options = "<--ntasks-per-node=1> <--cpu-bind=none> <env> <-u> <RANK> <-u> <LOCAL_RANK> <-u> <WORLD_SIZE>"
    assert result.stdout == f"ran srun {options} <{nodes}> <a b.yaml>", result.stderr
    assert len(sandbox.installations()) == 1


def test_a_job_from_elsewhere_is_told_where_to_submit_from(sandbox: Sandbox, tmp_path: Path) -> None:
    script = sandbox.script("slurm.sbatch")
    result = sandbox.run(script, "a.yaml", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert f"{tmp_path} is not the project's folder: submit from there, or set OGPSA_ROOT" in result.stderr
    result = sandbox.run(script, "a.yaml", SLURM_SUBMIT_DIR=str(tmp_path), OGPSA_ROOT=str(sandbox.project))
    assert "is not the project's folder" not in result.stderr


def test_what_slurm_is_asked_for(sandbox: Sandbox) -> None:
    """An agent on each node, and time to save; SLURM reads such lines up to the first command."""
    head = sandbox.script("slurm.sbatch").read_text(encoding="utf-8").partition("\nset ")[0]
    for option in ("--nodes=2", "--ntasks-per-node=1", "--signal=TERM@300", "--open-mode=append"):
        assert f"\n#SBATCH {option}\n" in head
