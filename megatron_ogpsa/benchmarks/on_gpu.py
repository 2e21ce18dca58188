"""Everything that wants a GPU, one after the other, in the time that there is: tests, FP8, the passes, a step, whole runs.

```
python -m megatron_ogpsa.benchmarks.on_gpu FOLDER --minutes 15 --model MODEL --sft S.jsonl --dpo P.jsonl --reference R.jsonl
```

Each leaves one file in FOLDER, and is not run again while that is there: what there was no time for is for the next call.
From the files :mod:`megatron_ogpsa.benchmarks.gpu_report` makes a page.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_ogpsa.benchmarks.gpu_tests import failures, read_tests
from megatron_ogpsa.console.commands import Command, in_turn, show_end
from megatron_ogpsa.errors import UserError

_PYTEST = ("pytest", "-m", "gpu", "-v", "-rA")
_TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m")
_MODEL_1B = (
    *("--bf16", "--transformer-impl", "transformer_engine", "--num-layers", "16", "--hidden-size", "2048"),
    *("--vocabulary", "32768", "--seq-length", "2048"),
)
_PASSES = "megatron_ogpsa.benchmarks.projection"
_RESUME, _TRACES = "goes_on", "trace"
"""Of FP8's tests, those that take three and two runs each; the others take one, beside those in bf16 that all share."""

MOST_PROCESSES = 12
"""Of FP8's tests side by side: each run of theirs takes some GB of the GPU, and two cores while it starts."""


@dataclass(frozen=True)
class Measurement:
    """One command and the file it leaves.

    Attributes:
        file: its name in the folder, which the page knows it by.
        flag: that names the file to the command.
        module: with its arguments.
        seconds: on an H200 with 16 cores, for the first ETA.
    """

    title: str
    file: str
    flag: str
    module: tuple[str, ...]
    seconds: float

    @property
    def name(self) -> str:
        """What ``--only`` knows it by."""
        return Path(self.file).stem

    def command(self, folder: Path) -> Command:
        """What is there already counts as done."""
        argv = [sys.executable, "-m", *self.module, self.flag, str(self.unfinished(folder))]
        result = folder / self.file
        return Command(self.title, argv, result.with_suffix(".log"), self.seconds, is_done=result.exists())

    def unfinished(self, folder: Path) -> Path:
        """What the command writes to, which gets its name when it has ended by itself."""
        return folder / f"unfinished-{self.file}"


def measurements(args: argparse.Namespace) -> list[Measurement]:
    """What there is to run, what is known least first; whole runs only where a model is given."""
    side_by_side = ("-n", str(min(MOST_PROCESSES, max(1, (os.cpu_count() or 1) // 2))))
    fp8 = (*_PYTEST, *side_by_side, "tests/gpu", "-k")
    found = [
        Measurement(
            "FP8 beside bf16", "fp8-figures.xml", "--junit-xml", (*fp8, f"not {_RESUME} and not {_TRACES}"), 210
        ),
        Measurement("FP8, resumed", "fp8-resume.xml", "--junit-xml", (*fp8, _RESUME), 130),
        Measurement("FP8, traces", "fp8-traces.xml", "--junit-xml", (*fp8, _TRACES), 260),
        Measurement("a training step", "steps.jsonl", "--json", (*_TORCHRUN, f"{__package__}.step", *_MODEL_1B), 80),
        Measurement(
            "a training step, the default rule",
            "default_step.jsonl",
            "--json",
            (*_TORCHRUN, f"{__package__}.step", *_MODEL_1B, "--space", "update", "--mode", "conflict", "--no-authors"),
            60,
        ),
        Measurement("its profile", "profile.json", "--json", (*_TORCHRUN, f"{__package__}.profile", *_MODEL_1B), 70),
        Measurement("the passes", "projection.json", "--json", (_PASSES, "--elements", "1e8"), 15),
        Measurement(
            "the passes, longer", "large.json", "--json", (_PASSES, "--elements", "5e8", "--rank", "2", "8"), 20
        ),
        Measurement(
            "the passes, of a small shard",
            "small.json",
            "--json",
            (_PASSES, "--elements", "1e7", "--device-times"),
            10,
        ),
        Measurement(
            "the passes, read by fours and twos",
            "narrow.json",
            "--json",
            (_PASSES, "--elements", "100000004", "100000002", "--rank", "2", "--basis-dtype", "bf16"),
            10,
        ),
        Measurement("tests of the kernels", "kernels.xml", "--junit-xml", (*_PYTEST, "tests/core"), 60),
    ]
    if args.model:
        found[3:3] = [_whole_runs(args, stage) for stage in ("sft", "dpo") if getattr(args, stage)]
    return [one for one in found if not args.only or one.name in args.only]


def _whole_runs(args: argparse.Namespace, stage: str) -> Measurement:
    flags = [
        "--settings",
        "plain",
        "update",
        "TRL, authors",
        "TRL, plain",
        *"--in-turn --nproc 1 --bf16 --rounds 1 --seq-length 2048".split(),
    ]
    sources = (f"--{stage}={getattr(args, stage)}", f"--reference={args.reference}")
    module = (f"{__package__}.training", str(args.model), *sources, *flags, f"--out={args.folder / 'training'}")
    return Measurement(f"whole runs of {stage.upper()}, beside TRL's", f"{stage}.json", "--json", module, 240)


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be measured here.

    Raises:
        UserError: no GPU, no tests, no Transformer Engine, or a model without data.
    """
    if not torch.cuda.is_available():
        raise UserError("no GPU: torch.cuda.is_available() is False; `megatron-ogpsa doctor` says more")
    if not Path("tests/gpu").is_dir():
        raise UserError("no tests/gpu here: run it in the folder of the project's sources, where the tests are")
    if find_spec("transformer_engine") is None:
        raise UserError("transformer_engine is not installed: docs/fp8.md says how")
    if args.model and not (args.reference and (args.sft or args.dpo)):
        raise UserError("--model MODEL wants --reference FILE and --sft FILE, --dpo FILE or both")
    if unknown := set(args.only or ()) - {one.name for one in measurements(args)}:
        raise UserError(f"--only {' '.join(sorted(unknown))}: not among what is measured")
    if args.minutes <= 0:
        raise UserError(f"--minutes {args.minutes:g}: use more than 0")


def measure(args: argparse.Namespace) -> list[str]:
    """Run what is left, each as long as the time allows; what failed, or is not there yet, in words."""
    until = time.monotonic() + 60 * args.minutes
    args.folder.mkdir(parents=True, exist_ok=True)
    wanted = {one.title: one for one in measurements(args)}
    for one in wanted.values():
        if one.file.endswith(".jsonl"):  # which the step appends to
            one.unfinished(args.folder).unlink(missing_ok=True)
    told = []
    for command, exit_code in in_turn([one.command(args.folder) for one in wanted.values()], until=until):
        one = wanted[command.title]
        if exit_code is not None and one.unfinished(args.folder).exists():
            one.unfinished(args.folder).rename(args.folder / one.file)
        if exit_code:
            show_end(command)
            told.append(f"{command.title}: failed, see {command.log}")
    for one in wanted.values():
        failed = failures(read_tests(args.folder / one.file)) if _has_tests(args.folder / one.file) else []
        told += [f"{one.title}: failed: {name}" for name in failed]
    left = [one.title for one in wanted.values() if not (args.folder / one.file).exists()]
    return [*told, *(f"{title}: not measured yet" for title in left)]


def _has_tests(result: Path) -> bool:
    return result.suffix == ".xml" and result.exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left; the exit code is 0 when nothing is left and nothing failed."""
    args = _parser().parse_args(argv)
    try:
        check(args)
        told = measure(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"a page of it: python -m megatron_ogpsa.benchmarks.gpu_report {args.folder}")
    for line in told:
        print(line, file=sys.stderr)
    return int(bool(told))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.on_gpu")
    parser.add_argument("folder", type=Path, help="where results go; those that are there are not made again")
    parser.add_argument("--minutes", type=float, default=math.inf, help="in which to end (no limit)")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the files that are to be made, without their endings"
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Hugging Face folder, for whole runs")
    for name, what in (
        ("sft", "conversations"),
        ("dpo", "preference pairs"),
        ("reference", "conversations to protect"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    return parser


if __name__ == "__main__":
    sys.exit(main())
