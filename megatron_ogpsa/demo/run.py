"""The verb ``demo``: the steps one after the other, with one progress line, and the table at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.demo.benchmark import Benchmark, BenchmarkSpec, write_benchmark
from megatron_ogpsa.demo.recipes import (
    VARIANTS,
    DemoSizes,
    base_config,
    evaluation_config,
    variant_config,
    write_config,
)
from megatron_ogpsa.demo.report import terminal_table, write_report
from megatron_ogpsa.demo.results import START, Results, read_curves
from megatron_ogpsa.demo.scoring import Scores
from megatron_ogpsa.errors import UserError

TITLES = {START: "start", "plain": "plain", "tensor": "OGPSA tensor", "model": "OGPSA model"}
LOG_TAIL = 15
"""Lines of a failed step's log that are shown."""


@dataclass(frozen=True)
class Step:
    """One process of the demo.

    Attributes:
        seconds: what it takes on two cores, for the first ETA; measured steps correct it.
        is_done: whether an earlier run has left its result.
    """

    title: str
    command: list[str]
    log: Path
    seconds: float
    is_done: bool = False


class DemoFailed(UserError):
    """A step ended with an error; the end of its log has been shown."""

    exit_code = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, how many ranks, and whether to start afresh."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)")
    parser.add_argument("--nproc", type=int, choices=(2, 4), default=2, help="ranks: 2 (DP2) or 4 (TP2×DP2)")
    parser.add_argument("--seed", type=int, default=1, help="of data, initialisation and order (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="train the starting model again, even if it is there")


def run(args: argparse.Namespace) -> int:
    """Train, fine-tune three times, evaluate, report.

    Raises:
        DemoFailed: a step failed, after the end of its log was printed.
        UserError: the output folder cannot be written.
    """
    started = time.monotonic()
    out: Path = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
        benchmark = write_benchmark(out / "data", BenchmarkSpec(seed=args.seed))
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error}): choose another folder") from None
    steps = plan_steps(benchmark, out, num_ranks=args.nproc, seed=args.seed, fresh=args.fresh)
    run_steps(steps)
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    results = Results(
        titles=TITLES,
        scores={name: Scores.from_json(fields) for name, fields in scores.items()},
        curves={name: read_curves(out / f"{name}.log") for name in VARIANTS},
        notes=notes(args, time.monotonic() - started),
    )
    paths = write_report(results, out / "report")
    print(terminal_table(results))
    print(f"\nreport: {paths[0]}\ntable:  {paths[1]}\nplots:  {', '.join(str(path) for path in paths[2:])}")
    print(
        f"took {time.monotonic() - started:.0f} s; each step can be run by hand: megatron-ogpsa train {out}/tensor.yaml"
    )
    return 0


def notes(args: argparse.Namespace, seconds: float) -> tuple[str, ...]:
    """The head of the report: what was run."""
    sizes = DemoSizes()
    layout = "DP2" if args.nproc == 2 else "TP2×DP2"
    return (
        f"One run with seed {args.seed} in {seconds:.0f} s, {args.nproc} ranks ({layout}), {os.cpu_count()} cores. "
        "One seed is an observation, not a result.",
        f"Starting model: {sizes.base_steps} steps on seven general tasks and on helping with any request.",
        f"Fine-tuning: {sizes.safety_steps} steps of Adam at {sizes.safety_lr:g} on safety data alone; references "
        f"refreshed every {sizes.refresh_interval} steps.",
    )


def plan_steps(benchmark: Benchmark, out: Path, *, num_ranks: int, seed: int, fresh: bool) -> list[Step]:
    """Write the configs and say how to run them; the starting model is kept if its config is what it was trained with."""
    sizes = DemoSizes()
    slower = 2.0 if num_ranks == 4 else 1.0  # four processes on two cores
    base, trained_with = out / "base", out / "base-trained.yaml"
    base_yaml = write_config(
        out / "base.yaml", base_config(benchmark, sizes, save=base, num_ranks=num_ranks, seed=seed)
    )
    is_done = not fresh and trained_with.exists() and trained_with.read_bytes() == base_yaml.read_bytes()
    if not is_done:
        shutil.rmtree(base, ignore_errors=True)
        trained_with.unlink(missing_ok=True)
    train = [sys.executable, "-m", "megatron_ogpsa.cli.main", "train"]
    steps = [Step("starting model", [*train, str(base_yaml)], out / "base.log", 85 * slower, is_done)]
    for variant in VARIANTS:
        shutil.rmtree(out / variant, ignore_errors=True)
        settings = variant_config(
            variant, benchmark, sizes, start=base, save=out / variant, num_ranks=num_ranks, seed=seed
        )
        path = write_config(out / f"{variant}.yaml", settings)
        steps.append(Step(f"fine-tuning, {TITLES[variant]}", [*train, str(path)], out / f"{variant}.log", 40 * slower))
    evaluation = write_config(out / "evaluate.yaml", evaluation_config(benchmark, num_ranks, seed))
    named = [f"{START}={base}", *(f"{variant}={out / variant}" for variant in VARIANTS)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    job = ["-m", "megatron_ogpsa.demo.evaluate", str(evaluation), str(benchmark.folder), str(out / "scores.json")]
    steps.append(Step("evaluation", [*launch, *job, *named], out / "evaluate.log", 13 * slower))
    return steps


def run_steps(steps: Sequence[Step], clock: Callable[[], float] = time.monotonic) -> None:
    """Run the steps that are left, with one line that says which, and when all will be done.

    Raises:
        DemoFailed: a step's exit code was not 0.
    """
    pace = 1.0  # measured seconds over expected ones, of the steps so far
    for index, step in enumerate(steps):
        if step.is_done:
            continue
        rest = sum(later.seconds for later in steps[index + 1 :] if not later.is_done)
        begun = clock()
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with step.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(step.command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            try:
                while process.poll() is None:
                    elapsed = clock() - begun
                    left = max(step.seconds * pace - elapsed, 1.0) + rest * pace
                    _show(f"[{index + 1}/{len(steps)}] {step.title}: {elapsed:3.0f} s, about {left:3.0f} s to go")
                    time.sleep(0.5)
            finally:
                if process.poll() is None:  # Ctrl-C: torchrun ends its ranks when it is told to
                    process.terminate()
                    process.wait()
        pace = (clock() - begun) / step.seconds
        _show("")
        if process.returncode != 0:
            _fail(step)
        if step.title == "starting model":
            shutil.copyfile(step.log.with_suffix(".yaml"), step.log.with_name("base-trained.yaml"))


def _fail(step: Step) -> None:
    lines = step.log.read_text(encoding="utf-8", errors="replace").splitlines()
    print("\n".join(lines[-LOG_TAIL:]), file=sys.stderr)
    raise DemoFailed(
        f"the step '{step.title}' failed; the end of {step.log} stands above, mend its cause and run again"
    )


def _show(text: str) -> None:
    """Rewrite the progress line; without a terminal each text stands on a line of its own, and only when it is new."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)
    elif text and text.split(":")[0] not in _shown:
        _shown.add(text.split(":")[0])
        print(text, flush=True)


_shown: set[str] = set()
