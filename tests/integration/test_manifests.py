"""The manifests of checkpoints: each rank hashes what it wrote, and what stops it is told by all."""

from __future__ import annotations

from pathlib import Path

from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from tests.integration.checkpoints import differences
from tests.integration.conftest import Train

ASYNC = "--async-save --use-persistent-ckpt-worker --async-strategy mcore"
DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()


def test_each_rank_hashes_what_it_wrote(train: Train, tmp_path: Path) -> None:
    """Beside the training where it is saved there; rank 0 alone hashes what it alone has written."""
    checked(train, tmp_path, "", place="rank")
    checked(train, tmp_path, ASYNC, place="writer")
    assert differences(tmp_path / "rank", tmp_path / "writer") == []


def checked(train: Train, tmp_path: Path, flags: str, *, place: str) -> None:
    run, hashed = tmp_path / place, tmp_path / "hashed.txt"
    hashed.unlink(missing_ok=True)
    left = run / "iter_0000003/.digests_1.json"
    left.parent.mkdir(parents=True)
    left.write_text('{"__1_0.distcp": "of a save that was cut short"}', encoding="utf-8")
    for name in (".digests_7.json", "__7_0.distcp", "__1_2.distcp"):  # of more ranks, and of more writers
        (left.parent / name).touch()
    outcome = train(*DP2, *flags.split(), "--save", place, module="tests.integration.recording_digests")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    of_rank_0 = {f"rank 0 {name}" for name in (".metadata", "metadata.json", "ogpsa.json")}
    expected = {f"{place} 0 __0_0.distcp", f"{place} 1 __1_0.distcp"} | of_rank_0
    for name in ("iter_0000003", "iter_0000006"):
        lines = hashed.read_text(encoding="utf-8").splitlines()
        here = [line.replace(f"{name}/", "") for line in lines if name in line]
        assert sorted(here) == sorted(expected)
        verify_integrity_manifest(str(run / name))  # Megatron reads it as its own
        names = ["integrity.json", *(line.split()[2] for line in expected)]
        assert sorted(path.name for path in (run / name).iterdir()) == sorted(names)
