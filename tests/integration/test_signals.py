"""SIGTERM to the command, as a scheduler sends it: a checkpoint at the step's end, Megatron's exit code, and it goes on."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import CONFIG, REFERENCE_SAMPLES, Train

STEPS = 300
"""More than are taken before a signal arrives."""

DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()


def test_sigterm_saves_and_the_next_start_goes_on(
    train: Train, preloaded: PreloadedCommand, inputs: Path, tmp_path: Path
) -> None:
    """Megatron's exit code is 0 (``train`` in ``megatron/training/training.py``), and so is the command's."""
    flags = ["--tokenizer-model", str(inputs / "tokenizer"), "--ogpsa-train-data", str(inputs / "safety.jsonl")]
    flags += ["--ogpsa-reference", f"general={inputs / 'general.jsonl'}", *DP2, "--train-iters", str(STEPS)]
    flags += ["--ogpsa-reference-samples", REFERENCE_SAMPLES]
    flags += ["--save", "out", "--load", "out", "--save-interval", str(STEPS), "--exit-signal-handler"]
    arguments = ["train", str(CONFIG), *flags]
    log = tmp_path / "output"
    command = preloaded.start("megatron_ogpsa.cli.main", arguments, folder=tmp_path, output=log, agent=True)
    deadline = time.monotonic() + 120
    while "iteration        2/" not in command.output:
        assert command.wait(0.02) is None, command.output[-3000:]
        assert time.monotonic() < deadline, command.output[-3000:]
    os.kill(command.pid, signal.SIGTERM)
    code = command.wait(timeout=60)
    command.kill()
    output = command.output
    assert code == 0, output[-3000:]
    assert "exiting program after receiving SIGTERM" in output
    last = steps(output)[-1]
    assert 2 <= last < STEPS
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text(encoding="utf-8") == str(last)

    outcome = train(*flags, "--exit-interval", str(last + 1), plain=True)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert steps(outcome.output) == [last + 1]


def steps(output: str) -> list[int]:
    """Numbers of the steps that were logged."""
    return [int(number) for number in re.findall(r"iteration +(\d+)/", output)]
