"""What cannot be converted is told in one line with a remedy, and nothing is left behind."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from megatron_ogpsa.conversion.convert import _written_whole
from megatron_ogpsa.errors import UserError
from tests.conversion.conftest import Conversions
from tests.conversion.troubles import TROUBLES


@pytest.mark.parametrize("name", TROUBLES)
def test_what_is_wrong_with_a_folder_is_told(conversions: Conversions, name: str) -> None:
    assert re.search(TROUBLES[name][1], conversions.troubles[name].error)
    left = {path.name for path in (conversions.top / "troubles").iterdir()}
    assert left == {*TROUBLES}


def test_a_folder_that_is_not_empty_stays_as_it_is(conversions: Conversions) -> None:
    assert "is not an empty folder" in conversions.troubles["occupied"].error
    assert conversions.megatron("llama2").exists()


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
