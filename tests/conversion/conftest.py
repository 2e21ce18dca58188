"""Models of all families, converted to Megatron and back by one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conversion import troubles
from tests.conversion.models import CONFIGS, TRAINED, UNSAID, build, build_unsaid, trained_config
from tests.data.conftest import build_hugging_face_folder
from tests.system.test_files import UNKNOWN

ROOT = Path(__file__).parents[2]
TIMEOUT = 200.0


@dataclass(frozen=True)
class Outcome:
    """How ``megatron-ogpsa convert`` ended."""

    exit_code: int
    output: str
    errors: str

    @property
    def error(self) -> str:
        """The one line that a user reads."""
        assert self.exit_code == 2, self.output + self.errors
        told = "megatron-ogpsa: error: "
        (line,) = (line[line.index(told) :] for line in self.errors.splitlines() if told in line)
        return line.removeprefix("megatron-ogpsa: error: ")


def convert(command_lines: Sequence[Sequence[str | Path]]) -> list[Outcome]:
    """Run ``megatron-ogpsa convert`` with several command lines, one after the other, in one process."""
    return run([("convert", *line) for line in command_lines])


def run(command_lines: Sequence[Sequence[str | Path]], folder: Path = ROOT) -> list[Outcome]:
    """The same of any subcommands that need Megatron on the meta device, in ``folder``."""
    argv = [[str(word) for word in line] for line in command_lines]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.planning.several"],
        cwd=folder,
        env=environment,
        input=json.dumps(argv),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [Outcome(*outcome) for outcome in json.loads(done.stdout)]


@dataclass(frozen=True)
class Conversions:
    """Below ``top``: ``NAME`` as transformers wrote it, ``NAME-megatron``, and ``NAME-back``."""

    top: Path
    troubles: dict[str, Outcome]

    def original(self, name: str) -> Path:
        return self.top / name

    def megatron(self, name: str) -> Path:
        return self.top / f"{name}-megatron"

    def back(self, name: str) -> Path:
        return self.top / f"{name}-back"


@pytest.fixture(scope="session")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> Conversions:
    top = tmp_path_factory.mktemp("conversions")
    for name, config in CONFIGS.items():
        build(top / name, config())
    build(top / "bf16-in-files", CONFIGS["qwen3"](), torch.bfloat16, max_shard_size="8KB")
    build_hugging_face_folder(top / "bf16-in-files")  # a tokenizer
    build(top / TRAINED, trained_config())
    build_hugging_face_folder(top / TRAINED)
    build_unsaid(top / UNSAID)
    names = [*CONFIGS, TRAINED, "bf16-in-files", UNSAID]
    there = [(top / name, top / f"{name}-megatron") for name in names]
    back = [(top / f"{name}-megatron", top / f"{name}-back", "--max-shard-size", "8e-6") for name in names]
    refused = troubles.make(top / "llama2", top / "troubles")
    others = [(top / "llama2", top / "llama2-megatron"), (top / UNKNOWN, top / "never")]
    outcomes = convert([*there, *back, *refused, *others])
    for outcome in outcomes[: 2 * len(names)]:
        assert outcome.exit_code == 0, outcome.output + outcome.errors
    named = zip([*troubles.TROUBLES, "occupied", "unknown"], outcomes[2 * len(names) :], strict=True)
    return Conversions(top, dict(named))
