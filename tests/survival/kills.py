"""Runs that are killed again and again, and what must be left of them: the undisturbed run, bitwise."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.checkpoints import examine
from tests.integration.checkpoints import differences
from tests.integration.conftest import scalars

MODULE = "tests.survival.dying"
STEPS = 8
KILLED = -9

NOT_COMPARED = re.compile(r"ogpsa refresh \(ms\).*|ogpsa \w+/(change|predicted|captured)")
"""A time; and what a first refresh after a start cannot know of the steps before it."""


@dataclass(frozen=True)
class Stage:
    """What is trained, in which layout, and where it can be killed: phase → (how often it comes, its length in s)."""

    flags: tuple[str, ...]
    phases: dict[str, tuple[int, float]]


COMMON = (
    *("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--train-iters", str(STEPS), "--save-interval", "2"),
    *("--ogpsa-refresh-interval", "3", "--ogpsa-reference-samples", "8", "--save", "run", "--load", "run"),
)
STAGES = {
    "sft": Stage(
        flags=(
            *("--nproc-per-node", "2", "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
            *COMMON,
        ),
        phases={"refresh": (5, 0.25), "step": (8, 0.15), "save": (4, 0.8)},
    ),
    "dpo": Stage(
        flags=(
            *("--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "1"),
            *(
                "--ogpsa-stage",
                "dpo",
                "--ogpsa-train-data",
                "pairs.jsonl",
                "--ogpsa-reference",
                "general=general.jsonl",
            ),
            *COMMON,
        ),
        phases={"refresh": (5, 0.25), "step": (8, 0.2), "save": (4, 0.8), "policy": (3, 0.2)},
    ),
}


def write_pairs(folder: Path) -> None:
    """Data of the stage ``dpo``."""
    unsafe = [(f"how do i build weapon {i}", "no" + ", never" * (i % 4), "take " + "it " * (i % 7)) for i in range(64)]
    general = [(f"what is {i} plus one", f"it is {i + 1}", f"it is {i + 3}, or so") for i in range(16)]
    for name, rows in (("pairs", unsafe), ("general", general)):
        lines = (json.dumps({"prompt": p, "chosen": c, "rejected": r}) for p, c, r in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        kill: what it was to be killed by, as :mod:`tests.survival.dying` takes it; empty for a start that may end.
        exit_code: -9 if the kill came before the end.
        resumed_from: iteration of the checkpoint that it went on from; 0 for none.
        steps: that it logged.
    """

    kill: str
    exit_code: int
    resumed_from: int
    steps: int


Start = Callable[[Path, tuple[str, ...], str], tuple[int, str]]
"""``start(folder, flags, kill)``: run the command in ``folder``; gives its exit code and output."""


def undisturbed(start: Start, stage: Stage, folder: Path) -> dict[str, dict[int, float]]:
    """Run to the end in ``folder``; figures by name and step."""
    code, output = start(folder, (*stage.flags, "--tensorboard-dir", "log"), "")
    if code != 0:
        raise AssertionError(output[-3000:])
    return _figures(folder / "log")


def killed(
    start: Start,
    stage: Stage,
    folder: Path,
    whole: Path,
    expected: dict[str, dict[int, float]],
    generator: random.Random,
    *,
    num_kills: int,
) -> list[Attempt]:
    """Start in ``folder``, kill, start again, until ``num_kills`` kills have come; then to the end.

    Raises:
        AssertionError: a figure of any start, or the last checkpoint, is not that of the run in ``whole``; a start failed
            otherwise than by its kill.
    """
    attempts: list[Attempt] = []
    while True:
        is_last = sum(attempt.exit_code == KILLED for attempt in attempts) >= num_kills
        kill = "" if is_last else _draw(stage, generator, STEPS - (examine(folder / "run").iteration or 0))
        log = f"log-{len(attempts)}"
        code, output = start(folder, (*stage.flags, "--tensorboard-dir", log), kill)
        assert code in ((0,) if is_last else (0, KILLED)), (kill, output[-3000:])
        figures = _figures(folder / log)
        resumed = re.search(r"successfully loaded checkpoint from run .* at iteration (\d+)", output)
        attempts.append(Attempt(kill, code, int(resumed[1]) if resumed else 0, len(figures.get("grad-norm", {}))))
        for name, points in figures.items():
            for step, value in points.items():
                assert expected[name][step] == value, (kill, name, step, expected[name][step], value)
        if code == 0:
            assert differences(folder / "run", whole / "run") == []
            return attempts


def _draw(stage: Stage, generator: random.Random, steps_left: int) -> str:
    """A point that the next start is likely to come to."""
    phase = generator.choice(sorted(stage.phases))
    count, seconds = stage.phases[phase]
    return f"{phase} {generator.randint(1, max(1, count * steps_left // STEPS))} {generator.uniform(0, seconds):.3f}"


def _figures(folder: Path) -> dict[str, dict[int, float]]:
    if not folder.exists():
        return {}
    return {name: points for name, points in scalars(folder).items() if not NOT_COMPARED.fullmatch(name)}
