"""Tokens per second of whole runs of SFT and DPO: plain, with the gradient projected, and with the update projected.

```
python -m megatron_ogpsa.benchmarks.training MODEL_FOLDER --sft S.jsonl --dpo P.jsonl --reference R.jsonl
```

Each run is an ordinary ``megatron-ogpsa train`` of a few steps, of the same model on the same packed rows; settings take
turns, in so many rounds, and ratios are taken within a round. Tokens are those of the data: padding is not counted. A step
is the median of those without a refresh; a refresh is told by itself, and spread over the paper's intervals. ``--in-turn``
adds, for each projected setting, runs in which steps take turns with plain ones in one process
(:mod:`megatron_ogpsa.benchmarks.every_second_step`): what projection costs where runs of the same setting differ by more.
``--trl`` has TRL's trainers take their turns too (:mod:`megatron_ogpsa.benchmarks.trl_training`), whose steps differ in
length: theirs are all tokens of such steps over all their seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ogpsa.benchmarks import trl_training
from megatron_ogpsa.benchmarks.speeds import WARM_UP, Speed, read_in_turn, read_speed, read_trl_speed
from megatron_ogpsa.benchmarks.timing import versions
from megatron_ogpsa.console.commands import Command, run_commands
from megatron_ogpsa.data.sources import open_source, require_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.references.steps import PAPERS_INTERVAL

EVERY_SECOND_STEP = f"{__package__}.every_second_step"
COMMAND = [sys.executable, "-m", "megatron_ogpsa.cli.main"]
PLAIN = "plain"
SETTINGS: Mapping[str, Mapping[str, str]] = {
    PLAIN: {},
    "gradient": {"ogpsa-space": "gradient", "ogpsa-mode": "orthogonal"},
    "update": {"ogpsa-space": "update", "ogpsa-mode": "conflict"},
}
TRL_SETTINGS: Mapping[str, str] = {f"TRL, {rule}": rule for rule in trl_training.RULES}
"""Names of what TRL's trainers run, and their ``--rule``."""

ROWS = {"sft": 400, "dpo": 60}
"""Of a source that are used: DPO computes the reference policy's log-probabilities of all pairs first."""

FEWEST_STEPS = 2 * WARM_UP + 1
"""Of which some count: neither among the first, nor with a refresh."""

SECONDS = 90.0
"""Of a run, for the first ETA."""


def config(args: argparse.Namespace, stage: str, setting: str) -> dict[str, Any]:
    """The file that one run trains with; settings differ in the projection alone."""
    protection = {
        "ogpsa-reference": {"general": str(args.reference.resolve())},
        "ogpsa-reference-samples": args.reference_samples,
        "ogpsa-reference-loss": ["nll"],
        "ogpsa-refresh-interval": _interval(args),
        "ogpsa-early-refreshes": False,  # a step with a refresh does not count
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
    commands = [Command("to Megatron", convert, args.out / "convert.log", 30.0, _start(args).exists())]
    speeds: dict[tuple[str, str], list[Path]] = {(stage, name): [] for stage in stages for name in args.settings}
    in_turn: dict[tuple[str, str], list[Path]] = {
        (stage, name): [] for stage, name in speeds if args.in_turn and name in SETTINGS and name != PLAIN
    }
    for round_number in range(1, args.rounds + 1):
        for (stage, name), files in speeds.items():
            command, told_in = _run(args, stage, name, round_number)
            commands.append(command)
            files.append(told_in)
        for (stage, name), files in in_turn.items():
            command = _run_in_turn(args, stage, name, round_number)
            commands.append(command)
            files.append(command.log)
    run_commands(commands)
    found = {key: _read(args, *key, files) for key, files in speeds.items()}
    ratios = {
        key: statistics.median(read_in_turn(log, _refreshed(2 * args.steps, 2 * _interval(args))) for log in logs)
        for key, logs in in_turn.items()
    }
    return [
        _account(stage, name, own, found[stage, PLAIN]) | {"of plain, in turn": ratios.get((stage, name))}
        for (stage, name), own in found.items()
    ]


def _read(args: argparse.Namespace, stage: str, name: str, files: Sequence[Path]) -> list[Speed]:
    refreshed = _refreshed(args.steps, _interval(args))
    if name in TRL_SETTINGS:
        return [read_trl_speed(file, refreshed) for file in files]
    return [read_speed(file, _data(args, stage), args.rows, refreshed) for file in files]


def _run(args: argparse.Namespace, stage: str, name: str, round_number: int) -> tuple[Command, Path]:
    """The command, and the file that will tell its speed."""
    title = f"{stage} {name}, round {round_number}"
    log = args.out / f"{stage}-{name.replace(', ', '-')}-{round_number}.log"
    if name in TRL_SETTINGS:
        told_in = log.with_suffix(".json")
        return Command(title, _with_trl(args, stage, name, told_in), log, SECONDS), told_in
    path = _config_file(args, stage, name)
    path.write_text(yaml.safe_dump(config(args, stage, name), sort_keys=False), encoding="utf-8")
    return Command(title, [*COMMAND, "train", str(path), *shlex.split(args.train_flags)], log, SECONDS), log


def _run_in_turn(args: argparse.Namespace, stage: str, name: str, round_number: int) -> Command:
    """Of so many steps plain and so many projected; what :func:`_run` wrote is its configuration."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    argv = [*torchrun, "-m", EVERY_SECOND_STEP, str(_config_file(args, stage, name))]
    argv += ["--train-iters", str(2 * args.steps), "--ogpsa-refresh-interval", str(2 * _interval(args))]
    log = args.out / f"{stage}-{name}-in-turn-{round_number}.log"
    return Command(
        f"{stage} {name} in turn, round {round_number}", [*argv, *shlex.split(args.train_flags)], log, SECONDS
    )


def _with_trl(args: argparse.Namespace, stage: str, name: str, told_in: Path) -> list[str]:
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
    return [*command, *(["--bf16"] if args.bf16 else [])]


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


def _config_file(args: argparse.Namespace, stage: str, name: str) -> Path:
    return Path(args.out) / f"{stage}-{name}.yaml"


def _refreshed(steps: int, interval: int) -> list[int]:
    """Steps, from 1, that begin with a refresh."""
    return [*range(1, steps + 1, interval)]


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
    parser.add_argument(
        "--in-turn", action="store_true", help="also runs in which projected steps take turns with plain ones"
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
            + (f"; step by step in one run {ratio:.3f}" if (ratio := result["of plain, in turn"]) else "")
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
