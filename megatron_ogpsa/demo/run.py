"""The verb ``demo``: the steps one after the other, with one progress line, and the table at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_ogpsa.console.commands import Command, run_commands
from megatron_ogpsa.console.training_log import read_curves
from megatron_ogpsa.demo.benchmark import BenchmarkSpec, write_benchmark
from megatron_ogpsa.demo.recipes import START, DemoSizes, Recipe, Variant, write_config
from megatron_ogpsa.demo.report import terminal_table, write_report
from megatron_ogpsa.demo.results import Results, Run
from megatron_ogpsa.demo.scoring import Scores
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.references.steps import PAPERS_INTERVAL

START_UP = 12.0
"""Seconds that a job of two ranks takes to start on two cores."""

TRAIN = [sys.executable, "-m", "megatron_ogpsa.cli.main", "train", "--nnodes", "1"]

STEP_SECONDS = {"base": 0.085, "sft": 0.1, "dpo": 0.15, "protected": 0.1}
"""Of one training step on two cores, and what the refreshes add to it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, how much to train, how many ranks, and whether to start afresh."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: runs/demo)")
    parser.add_argument(
        "--fast", action="store_true", help="SFT and SFT→DPO alone, in 2 minutes: too few steps to judge by"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repeat with N seeds; mean and spread")
    parser.add_argument("--seed", type=int, default=1, help="the first: of data, initialisation, order (default: 1)")
    parser.add_argument("--nproc", type=int, choices=(2, 4), default=2, help="ranks: 2 (DP2) or 4 (TP2×DP2)")
    parser.add_argument("--fresh", action="store_true", help="train the starting model again, even if it is there")


def run(args: argparse.Namespace) -> int:
    """Train, fine-tune for each seed, evaluate, report.

    Raises:
        CommandFailed: a step failed, after the end of its log was printed.
        UserError: the output folder cannot be written, or no seed.
    """
    started = time.monotonic()
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: use 1 or more")
    if args.seed < 1:  # which Megatron does not take
        raise UserError(f"--seed {args.seed}: use 1 or more")
    out: Path = args.out.resolve()
    try:
        recipes = [make_recipe(args, out, seed) for seed in range(args.seed, args.seed + args.seeds)]
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error}): choose another folder") from None
    run_commands(
        [step for recipe in recipes for step in plan_steps(recipe, fresh=args.fresh, seeds=args.seeds)], on_cpu=True
    )
    results = Results(
        variants={START: None, **recipes[0].variants},
        runs=[read_run(recipe) for recipe in recipes],
        notes=notes(args, recipes[0].sizes, time.monotonic() - started),
    )
    paths = write_report(results, out / "report")
    print(terminal_table(results))
    print(f"\nreport: {paths[0]}\ntable:  {paths[1]}\nplots:  {', '.join(str(path) for path in paths[2:])}")
    again = recipes[0].out / "ogpsa.yaml"
    print(
        f"took {time.monotonic() - started:.0f} s; SFT→DPO with OGPSA by hand: megatron-ogpsa train {again} --save DIR"
    )
    return 0


def make_recipe(args: argparse.Namespace, out: Path, seed: int) -> Recipe:
    """Write the data of one seed; several seeds get a folder each."""
    folder = out if args.seeds == 1 else out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = DemoSizes().reduced() if args.fast else DemoSizes()
    spec = BenchmarkSpec(
        seed=seed,
        base_train=sizes.base_conversations,
        safety_train=sizes.safety_conversations,
        eval_per_task=sizes.eval_per_task,
    )
    return Recipe(
        benchmark=write_benchmark(folder / "data", spec),
        sizes=sizes,
        out=folder,
        num_ranks=args.nproc,
        seed=seed,
    )


def read_run(recipe: Recipe) -> Run:
    """What one seed's steps have left."""
    scores = json.loads((recipe.out / "scores.json").read_text(encoding="utf-8"))
    return Run(
        seed=recipe.seed,
        scores={name: Scores.from_json(fields) for name, fields in scores.items()},
        curves={name: read_curves(recipe.out / f"{name}.log") for name, *_ in _fine_tuning(recipe)},
    )


def notes(args: argparse.Namespace, sizes: DemoSizes, seconds: float) -> tuple[str, ...]:
    """The head of the report: what was run."""
    layout = "DP2" if args.nproc == 2 else "TP2×DP2"
    seeds = f"seeds {args.seed} to {args.seed + args.seeds - 1}" if args.seeds > 1 else f"seed {args.seed}"
    worth = "mean ± standard deviation" if args.seeds > 1 else "one seed is an observation, not a result"
    return (
        f"{seeds.capitalize()} in {seconds:.0f} s, {args.nproc} ranks ({layout}), {os.cpu_count()} cores; {worth}.",
        f"Starting model: {sizes.base_steps} steps on seven general tasks and on helping with any request.",
        f"SFT: {sizes.sft_steps} steps of Adam at {sizes.sft_lr:g} on safety data alone. DPO: {sizes.dpo_steps} steps at "
        f"{sizes.dpo_lr:g} on pairs, or at {sizes.dpo_after_sft_lr:g} after SFT. References are refreshed as they are by "
        f"default: every {PAPERS_INTERVAL['sft']} steps in SFT and {PAPERS_INTERVAL['dpo']} in DPO, with the "
        "paper's rule by these alone, else more often at first.",
    )


def plan_steps(recipe: Recipe, *, fresh: bool, seeds: int = 1) -> list[Command]:
    """Write the configs and say how to run them; the starting model is kept if its config is what it was trained with."""
    out = recipe.out
    prefix = f"seed {recipe.seed}, " if seeds > 1 else ""
    steps = [base_step(recipe, fresh=fresh, prefix=prefix)]
    for name, settings in recipe.configs().items():
        shutil.rmtree(out / name, ignore_errors=True)
        write_config(out / f"{name}.yaml", settings)
    steps += [
        Command(f"{prefix}{variant.title}", [*TRAIN, *arguments], out / f"{name}.log", seconds * _slower(recipe))
        for name, variant, arguments, seconds in _fine_tuning(recipe)
    ]
    named = {START: str(recipe.base)} | {name: str(v.checkpoint(out)) for name, v in recipe.variants.items()}
    return [*steps, evaluation_step(recipe, named, out / "scores.json", title=f"{prefix}evaluation", seconds=16)]


def base_step(recipe: Recipe, *, fresh: bool, prefix: str = "") -> Command:
    """Training of the starting model; what an earlier run has left is done, if it had the same config."""
    out = recipe.out
    trained_with = out / "base-trained.yaml"
    config = write_config(out / "base.yaml", recipe.base_config())
    is_done = not fresh and trained_with.exists() and trained_with.read_bytes() == config.read_bytes()
    if not is_done:
        shutil.rmtree(recipe.base, ignore_errors=True)
        trained_with.unlink(missing_ok=True)
    seconds = (START_UP + recipe.sizes.base_steps * STEP_SECONDS["base"]) * _slower(recipe)
    command = [*TRAIN, str(config)]
    return Command(f"{prefix}starting model", command, out / "base.log", seconds, is_done, (config, trained_with))


def evaluation_step(recipe: Recipe, named: dict[str, str], result: Path, *, title: str, seconds: float) -> Command:
    """Scores of checkpoints into ``result``.

    Args:
        named: name → folder of a checkpoint, or ``FOLDER@ITERATION``.
    """
    config = write_config(recipe.out / "evaluate.yaml", recipe.evaluation_config())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(recipe.num_ranks)]
    job = ["-m", "megatron_ogpsa.demo.evaluate", str(config), str(recipe.benchmark.folder), str(result)]
    command = [*launch, *job, *(f"{name}={checkpoint}" for name, checkpoint in named.items())]
    return Command(title, command, result.with_suffix(".log"), seconds * _slower(recipe))


def _slower(recipe: Recipe) -> float:
    return 2.0 if recipe.num_ranks == 4 else 1.0  # four processes on two cores


def _fine_tuning(recipe: Recipe) -> Iterator[tuple[str, Variant, list[str], float]]:
    """Each command: the variant that it ends with, its arguments, and its seconds on two cores."""
    sizes = recipe.sizes

    def seconds(kind: str, num_steps: int, variant: Variant) -> float:
        return START_UP + num_steps * (STEP_SECONDS[kind] + (STEP_SECONDS["protected"] if variant.against else 0.0))

    for name, variant in recipe.variants.items():
        config = str(recipe.out / f"{variant.config}.yaml")
        of_sft, of_dpo = seconds("sft", sizes.sft_steps, variant), seconds("dpo", sizes.dpo_steps, variant)
        if variant.stage is None:
            yield name, variant, [config], of_dpo
        elif not sizes.whole_pipelines:
            yield name, variant, [config, "--stage", variant.stage], of_sft if variant.stage == "sft" else of_dpo
        elif variant.stage == "dpo":
            yield name, variant, [config], of_sft + of_dpo
