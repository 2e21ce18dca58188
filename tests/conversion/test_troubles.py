"""What cannot be converted is told in one line with a remedy, and nothing is left behind."""

from __future__ import annotations

import argparse
import errno
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from megatron_ogpsa.cli import convert
from megatron_ogpsa.conversion.checkpoint_reader import Checkpoint
from megatron_ogpsa.conversion.convert import _require_rows, _written_whole
from megatron_ogpsa.conversion.huggingface import INDEX_FILE, SINGLE_FILE, Weights, number_of_tokens
from megatron_ogpsa.errors import UserError
from tests.checkpoints.test_choice import save, track
from tests.conversion.conftest import Conversions
from tests.conversion.troubles import TROUBLES
from tests.data.conftest import build_hugging_face_folder


@pytest.mark.parametrize("name", TROUBLES)
def test_what_is_wrong_with_a_folder_is_told(conversions: Conversions, name: str) -> None:
    assert re.search(TROUBLES[name][1], conversions.troubles[name].error)
    left = {path.name for path in (conversions.top / "troubles").iterdir()}
    assert left == {*TROUBLES}


def test_a_folder_that_is_not_empty_stays_as_it_is(conversions: Conversions) -> None:
    assert "is not an empty folder" in conversions.troubles["occupied"].error
    assert conversions.megatron("llama2").exists()


def test_weights_are_those_that_transformers_reads(tmp_path: Path) -> None:
    """``save_pretrained`` over a folder that had several files leaves their index behind."""
    save_file({"a": torch.ones(2)}, tmp_path / SINGLE_FILE)
    (tmp_path / INDEX_FILE).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', encoding="utf-8")
    assert [*Weights(tmp_path).stored] == ["a"]


def test_folders_that_hold_checkpoints_deeper_or_higher_up_are_told(tmp_path: Path) -> None:
    stage = tmp_path / "run/dpo"
    track(save(stage, 100).parent, "100")
    with pytest.raises(UserError, match=r"iter_0000100: is one checkpoint .*/dpo and --ckpt-step 100$"):
        convert._require_no_checkpoints_around(stage / "iter_0000100")
    with pytest.raises(UserError, match=r"run: holds the checkpoints of several stages: name one .* as .*/dpo$"):
        convert._require_no_checkpoints_around(tmp_path / "run")
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


def test_rows_of_tokens_that_training_has_added_are_not_cut_off(tmp_path: Path) -> None:
    build_hugging_face_folder(tmp_path)
    number = number_of_tokens(tmp_path)
    assert number is not None
    assert number_of_tokens(tmp_path.parent) is None
    trained = SimpleNamespace(arguments=SimpleNamespace(tokenizer_model=str(tmp_path)), rows_of_embedding=number)
    for carried in (tmp_path, tmp_path.parent):
        _require_rows({"vocab_size": number}, carried, trained)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=rf"its tokenizer has {number} tokens, .* --hf .* says {number} or more"):
            _require_rows({"vocab_size": number - 1}, carried, trained)  # type: ignore[arg-type]
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    (note,) = _require_rows({"vocab_size": number - 1}, tmp_path, trained)  # type: ignore[arg-type]
    assert note.startswith(
        f"rows of the embedding beyond {number - 1} are taken for padding: {tmp_path}: its tokenizer"
    )


def test_a_disk_that_is_too_small_is_told_before_it_is_full(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"takes 1000000000.0 GB, .* are free"),
        _written_whole(tmp_path / "out", 10**18),
    ):
        pass
    assert [*tmp_path.iterdir()] == []


def test_what_is_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()  # of a conversion that was killed
    with pytest.raises(UserError, match="No space left on device"):
        _write_until_full(tmp_path / "out")
    assert [*tmp_path.iterdir()] == []
    with _written_whole(tmp_path / "out", 1) as folder:
        (folder / "whole").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def _write_until_full(target: Path) -> None:
    with _written_whole(target, 1) as folder:
        (folder / "half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
