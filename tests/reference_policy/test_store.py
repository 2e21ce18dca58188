"""The reference policy's file: what was written is read, and what is torn is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.reference_policy.store import LogProbs, read_log_probs, write_log_probs


@pytest.fixture
def log_probs() -> LogProbs:
    values = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = torch.arange(50) < 30
    return LogProbs.unknown(
        50, weights="ab" * 16, data=("first", "second"), settings={"rotary_base": "10000"}
    ).with_round(values, known)


def test_what_was_written_is_read(log_probs: LogProbs, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "log_probs.safetensors"
    assert read_log_probs(path) is None
    write_log_probs(path, log_probs)
    again = read_log_probs(path)
    assert again is not None
    assert again.values_N2.equal(log_probs.values_N2)
    assert again.is_known_N.equal(log_probs.is_known_N)
    assert (again.weights, again.data, again.settings) == (log_probs.weights, log_probs.data, log_probs.settings)
    assert not again.is_complete
    assert again.with_round(torch.ones(50, 2, dtype=torch.float64), ~again.is_known_N).is_complete
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_whatever_is_done_to_the_file_is_noticed(log_probs: LogProbs, tmp_path: Path) -> None:
    """Cut at each tenth, one bit flipped at each twentieth byte, zeroed, emptied."""
    path = tmp_path / "log_probs.safetensors"
    write_log_probs(path, log_probs)
    whole = path.read_bytes()
    versions = [whole[: len(whole) * tenth // 10] for tenth in range(10)] + [bytes(len(whole))]
    for position in range(0, len(whole), 20):
        flipped = bytearray(whole)
        flipped[position] ^= 4
        versions.append(bytes(flipped))
    for version in versions:
        path.write_bytes(version)
        with pytest.raises(UserError, match="is damaged: delete it"):
            read_log_probs(path)


def test_a_place_that_may_not_be_looked_into(tmp_path: Path) -> None:
    hidden = tmp_path / ("x" * 300)  # longer than a name may be, since root may look anywhere
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        read_log_probs(hidden / "log_probs.safetensors")


def test_a_place_that_cannot_be_written(log_probs: LogProbs, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--save: .* cannot be written"):
        write_log_probs(tmp_path / "file" / "log_probs.safetensors", log_probs)
