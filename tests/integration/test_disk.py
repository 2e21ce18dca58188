"""A disk that is full, read-only or failing: one line, exit code 2 (1 if it may pass), and what was saved before stays."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_ogpsa.checkpoints import examine
from megatron_ogpsa.data import sources
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.stage import require_data
from megatron_ogpsa.integration.checkpoints import disk as disk_of_run
from megatron_ogpsa.integration.checkpoints.disk import check_folders
from megatron_ogpsa.integration.projection import reference_data
from megatron_ogpsa.system.files import file_error
from tests.integration.conftest import Outcome, Train
from tests.integration.test_manifests import ASYNC

DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()
TWO_STEPS = [*DP2, "--train-iters", "2", "--save-interval", "1"]
CHECKPOINT_KILOBYTES = 3075000 // 1024 + 50
"""Of this configuration: 3 075 000 bytes in four files, and what a file system needs beside them."""

Mount = Callable[[str], Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mount]:
    """``mounted("size=4m")``: a file system in memory of its own; options of tmpfs."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        found = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if found.returncode:
            pytest.skip(f"file systems cannot be mounted here: {found.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True)


def told(outcome: Outcome, exit_code: int = 2) -> str:
    """The one line in which the command told its error."""
    assert outcome.exit_code == exit_code, outcome.output[-3000:]
    assert "Traceback" not in outcome.output, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1, outcome.error_lines
    return outcome.error_lines[0]


def test_a_full_disk_leaves_the_last_checkpoint_to_go_on_from(train: Train, mounted: Mount) -> None:
    """The first checkpoint fits, the second does not; the log of TensorBoard is on the same disk."""
    disk = mounted(f"size={CHECKPOINT_KILOBYTES * 3 // 2}k")
    run = disk / "run"
    flags = [*TWO_STEPS, "--save", str(run), "--load", str(run), "--tensorboard-dir", str(disk / "log")]
    line = told(train(*flags))
    assert f"--save {run}: the checkpoint of step 2 could not be written (No space left on device on rank" in line
    assert "it takes at least 2.8 MB, 1." in line
    assert "free space there, or name another folder; what was saved before is as it was" in line
    began = (run / "iter_0000002").stat().st_mtime_ns
    kept = [*(run / "iter_0000001").iterdir(), run / "latest_checkpointed_iteration.txt"]
    assert all(file.stat().st_mtime_ns < began for file in kept)
    assert kept[-1].read_text(encoding="utf-8") == "1"

    subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
    again = train(*flags)
    assert again.exit_code == 0, again.output[-3000:]
    assert "successfully loaded checkpoint from" in again.output
    assert (run / "iter_0000002/metadata.json").exists()
    assert kept[-1].read_text(encoding="utf-8") == "2"


def test_a_disk_that_is_full_for_a_writer_beside_the_training(train: Train, mounted: Mount) -> None:
    """Told by all ranks when they meet; a writer that had ended with its error would be waited for without end."""
    disk = mounted(f"size={CHECKPOINT_KILOBYTES * 3 // 4}k")
    run = disk / "run"
    beside = f"{ASYNC} --dist-ckpt-workers 2 --ckpt-assume-constant-structure"
    line = told(train(*TWO_STEPS, "--train-iters", "1", *beside.split(), "--save", str(run)))
    assert (
        f"--save {run}: a checkpoint could not be written beside the training (No space left on device on rank" in line
    )
    assert not (run / "latest_checkpointed_iteration.txt").exists()


KILLS = {
    "idle": ["--train-iters", "2", "--save-interval", "2"],
    "copying": ["--train-iters", "3", "--save-interval", "1"],
    "writing": ["--train-iters", "3", "--save-interval", "1"],
    "writing the last": ["--train-iters", "1", "--save-interval", "1"],
}


@pytest.mark.parametrize("place", KILLS)
def test_a_writer_that_is_killed_is_told_by_all_ranks(
    train: Train, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Of rank 1, before it is given anything to write, while it copies what it writes, and while it writes."""
    monkeypatch.setenv("KILL", place.split()[0])
    flags = [*DP2, *KILLS[place], *ASYNC.split(), "--save", "run"]
    line = told(train(*flags, module="tests.integration.killed_writer"), 1)
    assert (
        "the process that writes checkpoints beside the training has ended with signal 9; if nobody has killed" in line
    )
    assert line.endswith("(on rank 1)")


def test_a_target_that_cannot_be_written_is_refused_before_training(train: Train, mounted: Mount) -> None:
    disk = mounted("size=4m,ro")
    outcome = train(*TWO_STEPS, "--save", str(disk / "run"))
    assert (
        f"--save {disk / 'run'}: cannot be written (Read-only file system): free space there, or name another folder"
        in told(outcome)
    )
    assert "[before the start of training step]" not in outcome.output


FAILURES = {
    "read-only": "--save {run}: the checkpoint of step 2 could not be written (Read-only file system",
    "metadata": "--save {run}: the checkpoint of step 1 could not be written (Input/output error on rank 0)",
    "configuration": "--save {run}: the checkpoint of step 1 could not be written (Input/output error on rank 0)",
    "tracker": "--save {run}: the checkpoint of step 1 could not be written (Input/output error on rank 0)",
}


@pytest.mark.parametrize("place", FAILURES)
def test_a_disk_that_fails_under_rank_0_is_told_by_all(
    train: Train, mounted: Mount, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """While the other rank waits in a collective of Megatron's own."""
    disk = mounted("size=20m")
    monkeypatch.setenv("FAIL", f"{place} {disk}")
    outcome = train(
        *TWO_STEPS,
        *("--save", str(disk / "run"), "--tensorboard-dir", str(disk.parent / "log")),
        module="tests.integration.failing_disk",
    )
    assert FAILURES[place].format(run=disk / "run") in told(outcome, 2 if place == "read-only" else 1)
    if place == "read-only":
        assert (disk / "run/latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == "1"
        assert examine(disk / "run").problems == ()


def test_what_one_rank_meets_is_told_before_it_leaves_the_others(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it does not leave their process group, for which it might wait without end."""
    monkeypatch.setenv("FAIL", "metadata")
    monkeypatch.setenv("AS_WITH_NCCL", "")
    outcome = train(*TWO_STEPS, "--save", "run", module="tests.integration.failing_disk", agent=True)
    assert "could not be written (Input/output error on rank 0)" in told(outcome, 1)


def test_a_disk_that_fails_for_a_while_costs_a_restart(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "tracker")
    monkeypatch.setenv("FAIL_ONCE", str(tmp_path / "failed"))
    flags = [*TWO_STEPS, "--save", "run", "--load", "run"]
    outcome = train(*flags, "--max-restarts", "1", module="tests.integration.failing_disk", agent=True)
    assert "(Input/output error on rank 0): start again (--max-restarts does)" in told(outcome, 0)
    assert "All ranks are started again (after that, 0 more times)" in outcome.output
    assert examine(tmp_path / "run").iteration == 2

    monkeypatch.setenv("FAIL", "reading")
    monkeypatch.delenv("FAIL_ONCE")
    line = told(train(*flags, module="tests.integration.failing_disk"), 1)
    assert (
        "run/iter_0000002/.metadata cannot be read (Input/output error), which does not say that it is damaged" in line
    )
    assert line.endswith("(on rank 0)")


@pytest.mark.parametrize(
    ("number", "exit_code"),
    [(errno.EIO, 1), (errno.ESTALE, 1), (errno.ETIMEDOUT, 1), (errno.EBUSY, 1), (errno.EDQUOT, 2), (errno.EACCES, 2)],
)
def test_what_may_pass_is_worth_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    def fails(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(disk_of_run, "probe", fails)
    with pytest.raises(UserError) as caught:
        check_folders(save=str(tmp_path), tensorboard_dir=None)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize(("number", "exit_code"), [(errno.ESTALE, 1), (errno.EACCES, 2)])
def test_the_flag_that_names_a_source_takes_nothing_from_that(
    monkeypatch: pytest.MonkeyPatch, number: int, exit_code: int
) -> None:
    def fails(source: str | None = None, *_: object) -> None:
        error = OSError(number, os.strerror(number))
        raise file_error(error, f"{source or 'general.jsonl'}: cannot be read")

    monkeypatch.setattr(sources, "require_source", fails)
    args = argparse.Namespace(ogpsa_train_data="a.jsonl", ogpsa_valid_data=None, ogpsa_reference=[])
    with pytest.raises(UserError, match=r"^--ogpsa-train-data: a\.jsonl: cannot") as caught:
        require_data(args)
    assert caught.value.exit_code == exit_code

    monkeypatch.setattr(reference_data, "told_by_rank_0", lambda action, what: fails())
    args = argparse.Namespace(ogpsa_reference_loss=[], ogpsa_authors_rule=False, ogpsa_stage="sft")
    with pytest.raises(UserError, match=r"^--ogpsa-reference general: general\.jsonl: cannot") as caught:
        reference_data.reference_loader(args, None)("general", "general.jsonl")
    assert caught.value.exit_code == exit_code


def test_folders_are_looked_at_and_not_made(tmp_path: Path) -> None:
    check_folders(save=str(tmp_path / "a/b"), tensorboard_dir=str(tmp_path / "c"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--save .*/file/run: cannot be written \(Not a directory\): free space"):
        check_folders(save=str(tmp_path / "file/run"), tensorboard_dir=None)


@pytest.mark.parametrize(("rank", "local_rank", "looks_at"), [(0, 0, "save"), (2, 0, "save"), (3, 1, "tensorboard")])
def test_a_folder_is_looked_at_where_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int, local_rank: int, looks_at: str
) -> None:
    """Of two nodes with two ranks each."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank), ("WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    looked_at: list[str] = []
    monkeypatch.setattr(disk_of_run, "probe", lambda folder: looked_at.append(folder.name))
    check_folders(save=str(tmp_path / "save"), tensorboard_dir=str(tmp_path / "tensorboard"))
    assert looked_at == [looks_at]
