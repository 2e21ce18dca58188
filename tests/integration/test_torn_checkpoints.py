"""Checkpoints and trackers that were torn: told by name, and never a silent beginning anew or an exit code of 0."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_ogpsa.checkpoints import examine
from megatron_ogpsa.checkpoints.survey import TRACKER_FILE
from tests.checkpoints.damage import DAMAGES
from tests.integration.checkpoints import differences
from tests.integration.conftest import Train

DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()


@pytest.fixture
def resumed(train: Train, tmp_path: Path) -> Train:
    """A run that has saved at its steps 3 and 6; ``resumed(*flags)`` goes on from what is left of it in ``run``."""
    flags = [*DP2, "--save", "run"]
    outcome = train(*flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "Overwriting old incomplete" not in outcome.output
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    return lambda *more: train(*flags, "--load", "run", *more)


def test_every_file_of_a_checkpoint_and_its_tracker(resumed: Train, tmp_path: Path) -> None:
    """Each file of a real checkpoint in each way; then what the command makes of some of it."""
    run, newest = tmp_path / "run", tmp_path / "run/iter_0000006"
    files = sorted(path.name for path in newest.iterdir())
    assert {"integrity.json", "ogpsa.json", ".metadata", "metadata.json", "__0_0.distcp", "__1_0.distcp"} <= set(files)
    for name in files:
        for damage, tear in DAMAGES.items():
            tear(newest / name)
            found = examine(run)
            assert found.iteration == 3, (name, damage)
            assert any(name in problem for problem in found.problems), (name, damage)
            restore(tmp_path)
    for tear in DAMAGES.values():
        tear(run / TRACKER_FILE)
        found = examine(run)
        assert found.iteration == 6
        assert found.problems
        restore(tmp_path)

    DAMAGES["flipped"](newest / "__1_0.distcp")
    outcome = resumed()
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "WARNING: --load run: run/iter_0000006/__1_0.distcp is not what integrity.json says" in outcome.output
    assert "going on from iter_0000003" in outcome.output
    assert differences(run, tmp_path / "whole") == []

    DAMAGES["flipped"](newest / "__0_0.distcp")
    DAMAGES["deleted"](run / "iter_0000003/.metadata")
    outcome = resumed()
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1
    assert "run/iter_0000006/__0_0.distcp is not" in outcome.error_lines[0]
    assert "run/iter_0000003/.metadata is missing" in outcome.error_lines[0]
    assert "no checkpoint is left: restore one, or move the folder away" in outcome.error_lines[0]
    restore(tmp_path)

    finished = resumed()  # as after a kill between the last save and the end
    assert finished.exit_code == 0, finished.output[-3000:]
    assert "iteration        7/" not in finished.output
    assert differences(run, tmp_path / "whole") == []

    DAMAGES["emptied"](run / TRACKER_FILE)  # Megatron alone would end here, with 0
    outcome = resumed("--train-iters", "7", "--override-opt-param-scheduler")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert f"WARNING: --load run: run/{TRACKER_FILE} is empty" in outcome.output
    assert "going on from iter_0000006" in outcome.output
    assert "iteration        7/" in outcome.output
    assert (run / TRACKER_FILE).read_text() == "7"


def restore(folder: Path) -> None:
    shutil.rmtree(folder / "run")
    shutil.copytree(folder / "whole", folder / "run")


def test_a_non_persistent_checkpoint_is_verified_too(train: Train, tmp_path: Path) -> None:
    """Megatron prefers it to the others where it is newer."""
    flags = [*DP2, "--save", "run", "--load", "run"]
    flags += "--non-persistent-ckpt-type global --non-persistent-save-interval 5".split()
    outcome = train(*flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    run = tmp_path / "run"
    shutil.rmtree(run / "iter_0000006")
    (run / TRACKER_FILE).write_text("3", encoding="utf-8")
    shutil.copytree(run, tmp_path / "whole")

    outcome = train(*flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "WARNING" not in "".join(line for line in outcome.output.splitlines() if "--load run" in line)
    assert "iteration        5/" not in outcome.output
    assert "iteration        6/" in outcome.output

    restore(tmp_path)
    DAMAGES["flipped"](run / "non_persistent/iter_0000005/__1_0.distcp")
    outcome = train(*flags)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "WARNING: --load run: run/non_persistent/iter_0000005/__1_0.distcp is not what" in outcome.output
    assert "going on without run/non_persistent" in outcome.output
    assert "iteration        4/" in outcome.output

    # With nothing else saved, as early in a run that begins with given weights, it is what the run goes on from.
    restore(tmp_path)
    shutil.rmtree(run / "iter_0000003")
    (run / TRACKER_FILE).unlink()
    outcome = train(*flags, "--pretrained-checkpoint", "whole")
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "iteration        5/" not in outcome.output
    assert "iteration        6/" in outcome.output

    restore(tmp_path)
    DAMAGES["flipped"](run / "non_persistent/iter_0000005/__1_0.distcp")
    shutil.rmtree(run / "iter_0000003")
    (run / TRACKER_FILE).unlink()
    outcome = train(*flags)
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert "no checkpoint is left: restore one, or move run/non_persistent away" in outcome.error_lines[0]
