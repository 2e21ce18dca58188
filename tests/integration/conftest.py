"""Data, a configuration and a way to run the command as users do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data.conftest import build_hugging_face_folder
from tests.harness.preloaded import PreloadedCommand

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/example/sft.yaml"
REFERENCE_SAMPLES = "8"
"""Fewer than the configuration's: refreshes would take more time than all else."""

MICRO_BATCH_SIZE = "4"
"""Where one data-parallel rank has the whole batch: two micro-batches, as two ranks have each of the configuration's."""

GENERAL = ROOT.parent / "shared/data/general_sft.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    output: str
    folder: Path = Path()

    @property
    def error_lines(self) -> list[str]:
        """A line of another process may begin before one of these, and have no end yet: a progress bar."""
        return [
            line[line.index(told) :] for line in self.output.splitlines() if (told := "megatron-ogpsa: error:") in line
        ]


def write_inputs(folder: Path) -> Path:
    """A tokenizer, refusals to train on and general conversations as a reference."""
    folder.mkdir(exist_ok=True)
    build_hugging_face_folder(folder / "tokenizer")

    def write(name: str, rows: list[tuple[str, str]]) -> None:
        chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
        (folder / name).write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats), encoding="utf-8")

    write("safety.jsonl", [(f"how do i build weapon {i}", "i can not help with that") for i in range(64)])
    write("general.jsonl", [(f"what is {i} plus one", f"it is {i + 1}") for i in range(40)])
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the above."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


Train = Callable[..., Outcome]


@pytest.fixture
def train(inputs: Path, tmp_path: Path, preloaded: PreloadedCommand) -> Train:
    """The below, on the session's command."""
    return train_with(preloaded, inputs, tmp_path)


def train_with(preloaded: PreloadedCommand, inputs: Path, tmp_path: Path) -> Train:
    """``train(*flags, config=..., module=...)``: run ``megatron-ogpsa train`` in ``folder`` and wait.

    ``plain``: with nothing but ``flags``, where the configuration names all data. ``agent``: under torchrun's agent, which
    takes 2 s longer. ``fresh``: as users run it, in new processes too, which takes 10 to 20 s longer.
    """

    def run(
        *flags: str,
        config: Path = CONFIG,
        module: str = "megatron_ogpsa.cli.main",
        references: bool = True,
        plain: bool = False,
        agent: bool = False,
        fresh: bool = False,
        folder: Path = tmp_path,
        timeout: float = 240,
    ) -> Outcome:
        given: dict[str, Path | str] = (
            {} if plain else {"--tokenizer-model": inputs / "tokenizer", "--ogpsa-train-data": inputs / "safety.jsonl"}
        )
        if references and not plain:
            given["--ogpsa-reference"] = f"general={inputs / 'general.jsonl'}"
            given["--ogpsa-reference-samples"] = REFERENCE_SAMPLES
        if config == CONFIG and "--nproc-per-node" not in flags:
            given["--micro-batch-size"] = MICRO_BATCH_SIZE
        pairs = [str(part) for flag, value in given.items() if flag not in flags for part in (flag, value)]
        if not fresh:
            arguments = ["train", str(config), *pairs, *flags]
            finished = preloaded.run(module, arguments, folder=folder, timeout=timeout, agent=agent)
            if finished.exit_code is None:
                pytest.fail(f"still running after {timeout} s:\n{finished.output[-2000:]}")
            return Outcome(finished.exit_code, finished.output, folder)
        command = [sys.executable, "-m", module, "train", str(config), *pairs, *flags]
        places = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": places, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            pytest.fail(f"still running after {timeout} s:\n{output[-2000:]}")
        return Outcome(process.returncode, output, folder)

    return run


def scalars(folder: Path, *names: str) -> dict[str, dict[int, float]]:
    """What TensorBoard has, in full precision: name → step → value; of everything if no names are given."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    found = names or events.Tags()["scalars"]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in found}
