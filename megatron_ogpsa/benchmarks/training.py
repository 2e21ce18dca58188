"""Tokens per second of whole runs of SFT and DPO: plain, with the gradient projected, and with the update projected.

```
python -m megatron_ogpsa.benchmarks.training MODEL_FOLDER --sft S.jsonl --dpo P.jsonl --reference R.jsonl
```

Each run is an ordinary ``megatron-ogpsa train`` of a few steps, of the same model on the same packed rows; settings take
turns, in so many rounds, and ratios are taken within a round. Tokens are those of the data: padding is not counted. A step
is the median of those without a refresh; a refresh is told by itself, and spread over the paper's intervals. ``--trl`` has
TRL's trainers take their turns too (:mod:`megatron_ogpsa.benchmarks.trl_training`), whose steps differ in length: theirs
are all tokens of such steps over all their seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ogpsa.benchmarks import trl_training
from megatron_ogpsa.benchmarks.timing import versions
from megatron_ogpsa.console.commands import Command, run_commands
from megatron_ogpsa.console.training_log import read_curves
from megatron_ogpsa.data.sources import open_source, require_source
from megatron_ogpsa.errors import UserError

COMMAND = [sys.executable, "-m", "megatron_ogpsa.cli.main"]
PLAIN = "plain"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    PLAIN: {},
    "gradient": {"ogpsa-space": "gradient", "ogpsa-mode": "orthogonal"},
    "update": {"ogpsa-space": "update", "ogpsa-mode": "conflict"},
}
TRL_SETTINGS: Mapping[str, str] = {f"TRL, {rule}": rule for rule in trl_training.RULES}
"""Names of what TRL's trainers run, and their ``--rule``."""

PAPERS_INTERVAL = {"sft": 30, "dpo": 5}
"""Steps from one refresh to the next (arXiv:2602.07892), which a refresh's time is spread over."""

ROWS = {"sft": 400, "dpo": 60}
"""Of a source that are used: DPO computes the reference policy's log-probabilities of all pairs first."""

WARM_UP = 2
"""Steps that do not count."""

FEWEST_STEPS = 2 * WARM_UP + 1
"""Of which some count: neither among the first, nor with a refresh."""

SECONDS = 90.0
"""Of a run, for the first ETA."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one run's log tells.

    Attributes:
        tokens: of the data, in one optimizer step of all ranks.
        step_seconds: median over steps without a refresh.
        counted: seconds of each of those.
        refresh_seconds: of the last refresh; None without references.
        useful: share of a row's positions that are tokens of the data, not padding.
    """

    tokens: float
    useful: float
    step_seconds: float
    counted: Sequence[float]
    refresh_seconds: float | None

    def tokens_per_second(self, interval: int | None = None) -> float:
        """Without refreshes, or with one every ``interval`` steps."""
        refresh = (self.refresh_seconds or 0.0) / interval if interval else 0.0
        return self.tokens / (self.step_seconds + refresh)


def read_speed(log: Path, data: Path, rows_in_step: int, refreshed: Sequence[int]) -> Speed:
    """Of the log of one run.

    Args:
        data: what was trained on, as the log names it.
        refreshed: steps, from 1, that begin with a refresh.

    Raises:
        UserError: the log lacks what is looked for.
    """
    told = re.search(
        rf"data {re.escape(str(data))}: .* rows of (\d+) positions, ([\d.]+)% tokens", log.read_text(encoding="utf-8")
    )
    curves = read_curves(log)
    elapsed = curves.get("elapsed time per iteration (ms)")
    counted = (
        [
            milliseconds
            for step, milliseconds in zip(elapsed.steps, elapsed.values, strict=True)
            if step > WARM_UP and step not in refreshed
        ]
        if elapsed
        else []
    )
    if told is None or not counted:
        raise UserError(f"{log}: tells neither rows nor times of steps: look at its end for what went wrong")
    refresh = curves.get("ogpsa refresh (ms)")
    return Speed(
        tokens=rows_in_step * int(told[1]) * float(told[2]) / 100,
        useful=float(told[2]) / 100,
        step_seconds=statistics.median(counted) / 1e3,
        counted=[milliseconds / 1e3 for milliseconds in counted],
        refresh_seconds=refresh.values[-1] / 1e3 if refresh and refresh.values[-1] else None,
    )


def read_trl_speed(file: Path, refreshed: Sequence[int]) -> Speed:
    """Of the steps that :mod:`megatron_ogpsa.benchmarks.trl_training` wrote down.

    Args:
        refreshed: as in :func:`read_speed`; plain runs leave these steps out too, since each step has other samples.
    """
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"]
    counted = [step for number, step in enumerate(steps, 1) if number > WARM_UP and number not in refreshed]
    refreshes = [step["refresh_seconds"] for step in steps if step["refresh_seconds"]]
    tokens = sum(step["tokens"] for step in counted)
    return Speed(
        tokens=tokens / len(counted),
        useful=tokens / sum(step["positions"] for step in counted),
        step_seconds=sum(step["seconds"] for step in counted) / len(counted),
        counted=[step["seconds"] for step in counted],
        refresh_seconds=refreshes[-1] if refreshes else None,
    )


def config(args: argparse.Namespace, stage: str, setting: str) -> dict[str, Any]:
    """The file that one run trains with; settings differ in the projection alone."""
    protection = {
        "ogpsa-reference": {"general": str(args.reference.resolve())},
        "ogpsa-reference-samples": args.reference_samples,
        "ogpsa-reference-loss": ["nll"],
        "ogpsa-refresh-interval": _interval(args),
        **SETTINGS[setting],
    }
    return {
        "launch": {"nproc-per-node": args.nproc},
        "model": str(_start(args)),
        "seed": 1,
        "use-distributed-optimizer": True,
        "seq-length": args.seq_length,
        "max-position-embeddings": args.seq_length,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
        "micro-batch-size": 1,
        "global-batch-size": args.rows,
        "train-iters": args.steps,
        "lr": 1e-6,
        "log-interval": 1,
        "ogpsa-stage": stage,
        "ogpsa-train-data": str(_data(args, stage)),
        "ogpsa-packing": True,
        **({"bf16": True} if args.bf16 else {}),
        **({} if setting == PLAIN else protection),
    }


def measure(args: argparse.Namespace, stages: Sequence[str]) -> list[dict[str, Any]]:
    """Run everything in turn; one account for each stage and setting.

    Raises:
        UserError: a run failed, or a source cannot be read.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        rows = [row for _, row in islice(open_source(str(getattr(args, stage))).rows(), ROWS[stage])]
        _data(args, stage).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    convert = [*COMMAND, "convert", str(args.model), str(_start(args))]
    steps = [Command("to Megatron", convert, args.out / "convert.log", 30.0, _start(args).exists())]
    speeds: dict[tuple[str, str], list[Path]] = {(stage, name): [] for stage in stages for name in args.settings}
    for round_number in range(1, args.rounds + 1):
        for (stage, name), files in speeds.items():
            log = args.out / f"{stage}-{name.replace(', ', '-')}-{round_number}.log"
            command, told_in = (
                _trl_run(args, stage, name, log) if name in TRL_SETTINGS else _run(args, stage, name, log)
            )
            steps.append(Command(f"{stage} {name}, round {round_number}", command, log, SECONDS))
            files.append(told_in)
    run_commands(steps)
    refreshed = [*range(1, args.steps + 1, _interval(args))]
    found = {
        (stage, name): [
            read_trl_speed(file, refreshed)
            if name in TRL_SETTINGS
            else read_speed(file, _data(args, stage), args.rows, refreshed)
            for file in files
        ]
        for (stage, name), files in speeds.items()
    }
    return [_account(stage, name, own, found[stage, PLAIN]) for (stage, name), own in found.items()]


def _run(args: argparse.Namespace, stage: str, name: str, log: Path) -> tuple[list[str], Path]:
    """The command, and the file that will tell its speed."""
    path = args.out / f"{stage}-{name}.yaml"
    path.write_text(yaml.safe_dump(config(args, stage, name), sort_keys=False), encoding="utf-8")
    return [*COMMAND, "train", str(path), *shlex.split(args.train_flags)], log


def _trl_run(args: argparse.Namespace, stage: str, name: str, log: Path) -> tuple[list[str], Path]:
    told_in = log.with_suffix(".json")
    flags = {
        "stage": stage,
        "rule": TRL_SETTINGS[name],
        "data": _data(args, stage),
        "reference": args.reference,
        "reference-samples": args.reference_samples,
        "refresh-interval": _interval(args),
        "steps": args.steps,
        "tokens-per-step": args.rows * args.seq_length,
        "seq-length": args.seq_length,
        "out": args.out / "trl",
        "json": told_in,
    }
    command = [sys.executable, "-m", trl_training.__name__, str(args.model)]
    command += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
    return [*command, *(["--bf16"] if args.bf16 else [])], told_in


def _account(stage: str, name: str, speeds: Sequence[Speed], plain: Sequence[Speed]) -> dict[str, Any]:
    """Medians over rounds; ratios within a round first."""
    interval = PAPERS_INTERVAL[stage]
    pairs = [*zip(speeds, plain, strict=True)]
    refreshes = [speed.refresh_seconds for speed in speeds if speed.refresh_seconds is not None]
    return {
        "stage": stage,
        "setting": name,
        "tokens of a step": speeds[0].tokens,
        "share of positions that are tokens": speeds[0].useful,
        "seconds of a step": statistics.median(speed.step_seconds for speed in speeds),
        "seconds of each step": [speed.counted for speed in speeds],
        "seconds of a refresh": statistics.median(refreshes) if refreshes else None,
        "tokens per second": statistics.median(speed.tokens_per_second() for speed in speeds),
        "of plain": statistics.median(own.tokens_per_second() / its.tokens_per_second() for own, its in pairs),
        "steps from one refresh to the next": interval,
        "of plain, with refreshes": statistics.median(
            own.tokens_per_second(interval) / its.tokens_per_second() for own, its in pairs
        ),
    }


def _start(args: argparse.Namespace) -> Path:
    """The model as a Megatron checkpoint."""
    return Path(args.out.resolve()) / "start"


def _data(args: argparse.Namespace, stage: str) -> Path:
    return Path(args.out.resolve()) / f"{stage}.jsonl"


def _interval(args: argparse.Namespace) -> int:
    """Two refreshes in a run: the first one is slower, as everything is the first time."""
    return int(-(-args.steps // 2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.training")
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a Hugging Face folder of an instruct model")
    parser.add_argument("--sft", type=Path, metavar="FILE", help="conversations")
    parser.add_argument("--dpo", type=Path, metavar="FILE", help="preference pairs")
    parser.add_argument("--reference", type=Path, required=True, metavar="FILE", help="conversations to protect")
    for name, default in (
        ("reference-samples", 32),
        ("steps", 8),
        ("rounds", 3),
        ("rows", 4),
        ("seq-length", 512),
        ("nproc", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--train-flags", default="", metavar="FLAGS", help="more of megatron-ogpsa train's, in one word"
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        choices=[*SETTINGS, *TRL_SETTINGS],
        default=[*SETTINGS],
        metavar="SETTING",
        help=f"those of {', '.join(map(repr, (*SETTINGS, *TRL_SETTINGS)))} (the first {len(SETTINGS)}); "
        f"{PLAIN}, which ratios are to, is always among them",
    )
    parser.add_argument("--trl", action="store_true", help="both of TRL's as well")
    parser.add_argument("--out", type=Path, default=Path("runs/training-benchmark"), help="(runs/training-benchmark)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write JSON where it is asked for."""
    given = [*(sys.argv[1:] if argv is None else argv)]
    args = _parser().parse_args(given)
    args.settings = [*dict.fromkeys([PLAIN, *args.settings, *(TRL_SETTINGS if args.trl else ())])]
    stages = [stage for stage in ("sft", "dpo") if getattr(args, stage)]
    try:
        if not stages:
            raise UserError("nothing to train on: give --sft FILE, --dpo FILE or both")
        for name, least in (
            ("steps", FEWEST_STEPS),
            ("rounds", 1),
            ("rows", 1),
            ("reference_samples", 1),
            ("nproc", 1),
        ):
            if getattr(args, name) < least:
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: use {least} or more")
        require_source(str(args.reference))
        if TRL_SETTINGS.keys() & {*args.settings} and find_spec("trl") is None:
            raise UserError("TRL's trainers: trl is not installed: pip install 'megatron-ogpsa[test]'")
        results = measure(args, stages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for result in results:
        print(
            f"{result['stage']} {result['setting']:12} {result['tokens per second']:8.0f} tokens/s, {result['of plain']:.3f} "
            f"of plain; {result['of plain, with refreshes']:.3f} with refreshes"
        )
    if args.json:
        account = {
            "command": "python -m megatron_ogpsa.benchmarks.training " + " ".join(given),
            "date": time.strftime("%Y-%m-%d"),
            "cores": os.cpu_count(),
            **({"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
            "versions": versions("transformers", "trl"),
            "reference samples": args.reference_samples,
            "results": results,
        }
        args.json.write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
