"""Which checkpoint is chosen, on folders laid out as Megatron does."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from megatron_ogpsa.checkpoints import examine, manifest
from megatron_ogpsa.checkpoints.manifest import MANIFEST_FILE, write_manifest
from megatron_ogpsa.checkpoints.survey import HAS_MANIFEST, STATE_FILE, TRACKER_FILE
from megatron_ogpsa.errors import TransientError, UserError
from tests.checkpoints.damage import DAMAGES

FILES = (".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp", STATE_FILE)


def save(folder: Path, iteration: int, *, manifest: bool = True, finished: bool = True) -> Path:
    """A checkpoint with files of its own."""
    checkpoint = folder / f"iter_{iteration:07d}"
    checkpoint.mkdir(parents=True)
    for name in FILES if finished else FILES[2:]:
        (checkpoint / name).write_bytes(f"{name} of {iteration}".encode() * 20)
    (checkpoint / STATE_FILE).write_text(json.dumps({HAS_MANIFEST: manifest}), encoding="utf-8")
    if manifest and finished:
        write_manifest(checkpoint)
    return checkpoint


def track(folder: Path, text: str) -> None:
    (folder / TRACKER_FILE).write_text(text, encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, the newest of which is tracked."""
    for iteration in (2, 4, 6):
        save(tmp_path, iteration)
    track(tmp_path, "6")
    return tmp_path


def test_a_whole_checkpoint_is_taken_without_a_word(run: Path) -> None:
    found = examine(run)
    assert (found.iteration, found.problems, found.is_verified, found.is_tracked) == (6, (), True, True)
    verify_integrity_manifest(str(run / "iter_0000006"))  # Megatron can read what we write


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [*FILES, MANIFEST_FILE])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(run: Path, file: str, damage: str) -> None:
    path = run / "iter_0000006" / file
    DAMAGES[damage](path)
    found = examine(run)
    assert found.iteration == 4
    assert any(str(path.parent) in problem and file in problem for problem in found.problems), found.problems
    DAMAGES[damage](run / "iter_0000004" / file)
    assert examine(run).iteration == 2


class Unreadable:
    """A file that the file system refuses to open, so many times."""

    def __init__(self, path: Path, number: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = times
        open_as_ever = Path.open

        def refusing(opened: Path, *args: Any, **kwargs: Any) -> Any:
            if opened == path and self.left:
                self.left -= 1
                raise OSError(number, os.strerror(number), str(opened))
            return open_as_ever(opened, *args, **kwargs)

        monkeypatch.setattr(Path, "open", refusing)
        monkeypatch.setattr(manifest, "RETRY_SECONDS", 0.0)


OF_A_RUN = ["iter_0000006/__0_0.distcp", f"iter_0000006/{MANIFEST_FILE}", TRACKER_FILE]


@pytest.mark.parametrize("file", OF_A_RUN)
def test_a_file_that_cannot_be_read_at_first_is_looked_at_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    unreadable = Unreadable(run / file, errno.EIO, 1, monkeypatch)
    found = examine(run)
    assert (found.iteration, found.problems, found.is_tracked) == (6, (), True)
    assert unreadable.left == 0


@pytest.mark.parametrize("file", OF_A_RUN)
@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, TransientError), (errno.EACCES, UserError)])
def test_what_stays_unreadable_is_told_and_not_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch, file: str, number: int, kind: type[UserError]
) -> None:
    """Until a person moves it away."""
    unreadable = Unreadable(run / file, number, 100, monkeypatch)
    with pytest.raises(UserError, match=f"{file} cannot be read .*, or move the file away") as caught:
        examine(run)
    assert type(caught.value) is kind
    unreadable.left = 0
    (run / file).unlink()
    assert examine(run).iteration == (6 if file == TRACKER_FILE else 4)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tracker_is_named_and_the_newest_whole_checkpoint_is_taken(run: Path, damage: str) -> None:
    DAMAGES[damage](run / TRACKER_FILE)
    found = examine(run)
    assert found.iteration == 6
    assert not found.is_tracked
    assert any(TRACKER_FILE in problem or "the tracker names" in problem for problem in found.problems)


def test_files_that_are_there_are_enough_without_looking_into_them(run: Path) -> None:
    DAMAGES["flipped"](run / "iter_0000006/__0_0.distcp")
    assert examine(run, contents=False).iteration == 6
    DAMAGES["deleted"](run / "iter_0000006/__0_0.distcp")
    assert examine(run, contents=False).iteration == 4


def test_a_tracker_that_was_set_back_is_followed_and_told(run: Path) -> None:
    track(run, "4")
    found = examine(run)
    assert found.iteration == 4
    assert found.problems == (f"{run / 'iter_0000006'} is complete, but iter_0000004 is what the tracker names",)


def test_an_iteration_that_is_asked_for_is_the_only_one(run: Path) -> None:
    assert examine(run, 2).iteration == 2
    DAMAGES["flipped"](run / "iter_0000002/__0_0.distcp")
    assert examine(run, 2).chosen is None
    assert examine(run, 3).problems == (f"{run / 'iter_0000003'} is missing",)


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert examine(tmp_path / "new") == examine(tmp_path)
    save(tmp_path, 2, finished=False)  # killed within its first save
    found = examine(tmp_path)
    assert (found.chosen, found.problems) == (None, ())
    save(tmp_path, 4)
    DAMAGES["deleted"](tmp_path / "iter_0000004" / MANIFEST_FILE)  # killed just before its manifest
    assert examine(tmp_path).chosen is None
    assert examine(tmp_path).problems == ()


def test_without_a_manifest_only_the_tracked_checkpoint_is_taken(tmp_path: Path) -> None:
    """Checkpoints of other programs, or of --no-verify-integrity."""
    for iteration in (2, 4):
        save(tmp_path, iteration, manifest=False)
    track(tmp_path, "4")
    found = examine(tmp_path)
    assert (found.iteration, found.is_verified, found.problems) == (4, False, ())
    DAMAGES["emptied"](tmp_path / TRACKER_FILE)
    found = examine(tmp_path)
    assert found.chosen is None
    assert "nothing says whether it is complete" in found.problems[-1]


def test_a_release_is_taken(tmp_path: Path) -> None:
    save(tmp_path, 0).rename(tmp_path / "release")
    track(tmp_path, "release")
    found = examine(tmp_path)
    assert (found.iteration, found.is_verified, found.is_tracked) == (0, True, True)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"algorithm": "md5", "files": {}}', '{"algorithm": "sha256", "files": {"../x": "00"}}', "[" * 5000],
)
def test_a_manifest_that_is_none_is_damage(run: Path, content: str) -> None:
    (run / "iter_0000006" / MANIFEST_FILE).write_text(content, encoding="utf-8")
    found = examine(run)
    assert found.iteration == 4
    assert MANIFEST_FILE in found.problems[0]
