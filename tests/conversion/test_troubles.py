"""What cannot be converted is told in one line with a remedy, and nothing is left behind."""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_ogpsa.cli import convert
from megatron_ogpsa.conversion import checkpoint_reader
from megatron_ogpsa.conversion.checkpoint_reader import Checkpoint, is_checkpoint_folder
from megatron_ogpsa.conversion.convert import _carried, _require_rows, _written_whole
from megatron_ogpsa.conversion.huggingface import (
    INDEX_FILE,
    SINGLE_FILE,
    Weights,
    carry_files,
    number_of_tokens,
    read_config,
)
from megatron_ogpsa.errors import UserError
from tests.checkpoints.test_choice import Unreadable, save, track
from tests.conversion.conftest import Conversions
from tests.conversion.troubles import TROUBLES
from tests.data.conftest import build_hugging_face_folder
from tests.system.test_files import UNKNOWN


@pytest.mark.parametrize("name", TROUBLES)
def test_what_is_wrong_with_a_folder_is_told(conversions: Conversions, name: str) -> None:
    assert re.search(TROUBLES[name][1], conversions.troubles[name].error)
    left = {path.name for path in (conversions.top / "troubles").iterdir()}
    assert left == {*TROUBLES}


def test_a_folder_that_is_not_empty_stays_as_it_is(conversions: Conversions) -> None:
    assert "is not an empty folder" in conversions.troubles["occupied"].error
    assert conversions.megatron("llama2").exists()


def test_a_folder_that_cannot_be_looked_for_is_told(conversions: Conversions, tmp_path: Path) -> None:
    """As in another user's home: the source, and what ``--hf`` or a run's ``--tokenizer-model`` names."""
    told = r"cannot be read \(File name too long\): see to its folder, or name another$"
    assert re.search(told, conversions.troubles["unknown"].error)
    unknown = tmp_path / UNKNOWN
    for look in (is_checkpoint_folder, read_config, number_of_tokens):
        with pytest.raises(UserError, match=told):
            look(unknown)
    with pytest.raises(UserError, match=told):
        _carried(tmp_path, _checkpoint(1, str(unknown)))


def test_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """``save_pretrained`` over a folder that had several files leaves their index behind."""
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', encoding="utf-8")
    assert [*Weights(tmp_path).stored] == ["a"]


def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``save_pretrained`` writes them for their owner alone."""
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    Unreadable(tmp_path / SINGLE_FILE, errno.EACCES, 1, monkeypatch)
    with pytest.raises(UserError, match=rf"{SINGLE_FILE}: cannot be read \(Permission denied\): make it readable"):
        Weights(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "additional_chat_templates/tool_use.jinja"])
def test_the_target_is_not_blamed_for_a_source_that_may_not_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = tmp_path / "source"
    (source / name).parent.mkdir(parents=True)
    (source / name).touch()
    Unreadable(source / name, errno.EACCES, 1, monkeypatch)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: pytest.fail("was copied"))
    with (
        pytest.raises(UserError, match=rf"{source / name}: cannot be read \(Permission denied\): make it readable"),
        _written_whole(tmp_path / "target", 1) as folder,
    ):
        carry_files(source, folder)
    assert not (tmp_path / "target").exists()


def test_folders_that_hold_checkpoints_deeper_or_higher_up_are_told(tmp_path: Path) -> None:
    stage = tmp_path / "run/dpo"
    track(save(stage, 100).parent, "100")
    with pytest.raises(UserError, match=r"iter_0000100: is one checkpoint .*/dpo and --ckpt-step 100$"):
        convert._require_no_checkpoints_around(stage / "iter_0000100")
    with pytest.raises(UserError, match=r"run: holds the checkpoints of several stages: name one .* as .*/dpo$"):
        convert._require_no_checkpoints_around(tmp_path / "run")
    convert._require_no_checkpoints_around(tmp_path)


def test_what_lies_beside_a_model_is_not_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk of its own there is lost+found, which root alone may read."""
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "config.json").touch()

    def refused(folder: Path) -> bool:
        raise UserError(f"{folder} cannot be read")

    monkeypatch.setattr(checkpoint_reader, "is_checkpoint_folder", refused)
    convert._require_no_checkpoints_around(tmp_path)


def test_a_step_that_was_not_saved_is_answered_with_those_that_were(tmp_path: Path) -> None:
    track(save(tmp_path, 100).parent, "100")
    save(tmp_path, 50)
    with pytest.raises(UserError, match=r"say --ckpt-step 100 or 50$"):
        Checkpoint(tmp_path, 99)


@pytest.mark.parametrize(("text", "expected"), [("5", 5 * 10**9), ("inf", sys.maxsize), ("1e-12", 1)])
def test_sizes_of_weights_files(text: str, expected: int) -> None:
    assert convert._gigabytes(text) == expected
    for wrong in ("0", "-1", "nan", "five"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size above 0"):
            convert._gigabytes(wrong)


def _checkpoint(rows: int, tokenizer_model: object) -> Checkpoint:
    """One of which only this is known."""
    return SimpleNamespace(arguments=SimpleNamespace(tokenizer_model=tokenizer_model), rows_of_embedding=rows)  # type: ignore[return-value]


def test_rows_of_tokens_that_training_has_added_are_not_cut_off(tmp_path: Path) -> None:
    build_hugging_face_folder(tmp_path)
    number = number_of_tokens(tmp_path)
    assert number is not None
    assert number_of_tokens(tmp_path.parent) is None
    trained = _checkpoint(number, str(tmp_path))
    for carried in (tmp_path, tmp_path.parent):
        assert _require_rows(number, carried, trained) == []
        with pytest.raises(UserError, match=rf"has tokens up to {number - 1}, .* --hf .* says {number} or more"):
            _require_rows(number - 1, carried, trained)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    (note,) = _require_rows(number - 1, tmp_path, trained)
    assert note.startswith(
        f"rows of the embedding beyond {number - 1} are taken for padding: {tmp_path}: its tokenizer"
    )


@pytest.mark.parametrize(
    ("trained_with", "reason"),
    [
        ("/elsewhere/tokenizer", "/elsewhere/tokenizer, with which it was trained, is no folder with a tokenizer here"),
        (None, "the checkpoint does not say which tokenizer it was trained with"),
    ],
)
def test_rows_that_may_be_of_tokens_are_told(tmp_path: Path, trained_with: str | None, reason: str) -> None:
    number = number_of_tokens(build_hugging_face_folder(tmp_path))
    assert number is not None
    trained = _checkpoint(number + 8, trained_with)
    (note,) = _require_rows(number, tmp_path, trained)
    assert note == f"rows of the embedding beyond {number} are taken for padding: {reason}"
    assert _require_rows(number + 8, tmp_path, trained) == []


def test_tokens_are_counted_up_to_the_highest(tmp_path: Path) -> None:
    """A token may be added beyond those that there are, which leaves a gap."""
    number = number_of_tokens(build_hugging_face_folder(tmp_path))
    assert number is not None
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["added_tokens"].append(settings["added_tokens"][-1] | {"id": number + 7, "content": "<|far|>"})
    settings["model"]["vocab"]["<|far|>"] = number + 7
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert number_of_tokens(tmp_path) == number + 8


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"takes 1000000000.0 GB, .* are free"),
        _written_whole(tmp_path / "out", 10**18),
    ):
        pass
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("file/out", "File exists"),
        ("file/deeper/out", "Not a directory"),
        (UNKNOWN, "File name too long"),
        ("loop/out", ""),  # which each Python says otherwise
    ],
)
def test_a_place_where_no_folder_can_be_is_told(tmp_path: Path, target: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with (
        pytest.raises(UserError, match=rf"{target}: cannot be made \(.*{reason}.*\): name another folder$"),
        _written_whole(tmp_path / target, 1),
    ):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_what_is_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()  # of a conversion that was killed
    with pytest.raises(UserError, match="No space left on device"):
        _write_until_full(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
    with _written_whole(tmp_path / "out", 1) as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_an_empty_folder_that_is_there_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays that folder: a mount point cannot be another one, and whose shell is in it would see nothing."""
    place = tmp_path / "out"
    place.mkdir()
    before = place.stat().st_ino
    (tmp_path / "link").symlink_to(place, target_is_directory=True)
    monkeypatch.chdir(place)
    for target in (place, tmp_path / "link", Path()):
        with _written_whole(target, 1) as folder:
            (folder / "config.json").touch()
            (folder / "release").mkdir()
            assert folder.is_relative_to(place)  # on its disk
            assert [*place.iterdir()] == [folder]
            assert folder.name.startswith(".")
        assert {path.name for path in Path().iterdir()} == {"config.json", "release"}
        assert place.stat().st_ino == before
        (place / "config.json").unlink()
        (place / "release").rmdir()
    assert (tmp_path / "link").is_symlink()


def test_a_folder_that_is_there_is_empty_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / ".partial").mkdir()  # of a conversion that was killed
    with pytest.raises(UserError, match="No space left on device"):
        _write_until_full(tmp_path)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "of somebody").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        _write_until_full(tmp_path)


@pytest.mark.parametrize("mark", ["config.json", "model.yaml", "latest_checkpointed_iteration.txt"])
def test_a_folder_that_is_there_looks_whole_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str
) -> None:
    """Not before, when it is killed while it moves them."""
    moved: list[str] = []
    replace = Path.replace

    def noted(path: Path, target: Path) -> Path:
        moved.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", noted)
    with _written_whole(tmp_path, 1) as folder:
        for name in (mark, "a", "z"):
            (folder / name).touch()
    assert {path.name for path in tmp_path.iterdir()} == {*moved} == {mark, "a", "z"}
    assert moved[-1] == mark


def test_free_space_is_that_of_the_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == tmp_path else 100))
    with pytest.raises(UserError, match="are free"), _written_whole(tmp_path, 1):
        pass


def _write_until_full(target: Path) -> None:
    with _written_whole(target, 1) as folder:
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
