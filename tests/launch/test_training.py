"""The scripts for training pass on what they are given, to the command or to SLURM's ``srun``."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_many_nodes_without_their_number_are_refused_before_anything_is_installed(sandbox: Sandbox) -> None:
    result = sandbox.run(sandbox.script("train_nodes.sh"), "a.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("megatron-ogpsa: NNODES is not set")
    assert not sandbox.installations()


@pytest.mark.parametrize("flag", [["--nnodes", "2"], ["--nnodes=2"], []])
def test_many_nodes_by_a_flag_or_the_file(sandbox: Sandbox, tmp_path: Path, flag: list[str]) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("lr: 1.0\n" if flag else "launch:\n  nnodes: 2\n", encoding="utf-8")
    result = sandbox.run(sandbox.script("train_nodes.sh"), str(config), *flag)
    assert result.stdout.startswith("ran megatron-ogpsa <train>"), result.stderr


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
