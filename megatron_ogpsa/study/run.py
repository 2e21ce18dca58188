"""The verb ``study``: every setting with every seed; what an earlier run has scored is not run again."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

from megatron_ogpsa.console.commands import Command, run_commands
from megatron_ogpsa.demo.benchmark import BenchmarkSpec, write_benchmark
from megatron_ogpsa.demo.recipes import DemoSizes, Recipe, write_config
from megatron_ogpsa.demo.recipes import Settings as Flags
from megatron_ogpsa.demo.run import START_UP, STEP_SECONDS, TRAIN, base_step, evaluation_step
from megatron_ogpsa.demo.scoring import Scores
from megatron_ogpsa.demo.tasks import GENERAL_TASKS
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.study.report import write_report
from megatron_ogpsa.study.settings import PLAIN, SETTINGS, Setting
from megatron_ogpsa.study.tradeoff import Curve, Point

START = "start"

SIZES = DemoSizes()

INTERVAL = 10
"""Steps between two refreshes, where a setting does not say otherwise."""

HELD_OUT_REQUESTS = 400
"""Of each kind, of 864. A share of them near a half has a standard error of 2.5 points."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write, how many seeds, and which settings."""
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="output folder (default: runs/study)")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 1 to N (default: 5)")
    parser.add_argument(
        "--settings",
        default=",".join(SETTINGS),
        metavar="NAME,…",
        help=f"of {', '.join(SETTINGS)} (default: all); plain always",
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="also write results and plots there")
    parser.add_argument(
        "--reduced", action="store_true", help="a few steps of each: to try the command, not to judge by"
    )


def run(args: argparse.Namespace) -> int:
    """Run what is not there yet, setting by setting, then report.

    Raises:
        UserError: an unknown setting, no seed, or a folder that cannot be written.
        CommandFailed: a step failed, after the end of its log was printed.
    """
    names = chosen_settings(args.settings)
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: use 1 or more")
    started = time.monotonic()
    out: Path = args.out.resolve()
    try:
        recipes = [make_recipe(out, seed, reduced=args.reduced) for seed in range(1, args.seeds + 1)]
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error}): choose another folder") from None
    if args.report:
        _require_folder(args.report)
    run_commands([base_step(recipe, fresh=False, prefix=f"seed {recipe.seed}, ") for recipe in recipes], on_cpu=True)
    run_commands([step for name in names for recipe in recipes for step in steps_of(recipe, name)], on_cpu=True)
    curves = {name: {recipe.seed: curve_of(recipe, name) for recipe in recipes} for name in names}
    paths = write_report(curves, out / "report")
    if args.report:
        write_report(curves, args.report)
    print(paths[0].read_text(encoding="utf-8"))
    print(f"report: {', '.join(map(str, paths))}; took {time.monotonic() - started:.0f} s")
    return 0


def _require_folder(folder: Path) -> None:
    """Look whether ``--report`` can be written before there are hours of work to report."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"--report {folder}: cannot be written ({error.strerror}): choose another folder") from None


def chosen_settings(text: str) -> list[str]:
    """Names separated by commas, each once; plain fine-tuning first, which all are compared with.

    Raises:
        UserError: a name that is none.
    """
    names = list(dict.fromkeys([PLAIN, *text.split(",")]))
    if unknown := [name for name in names if name not in SETTINGS]:
        raise UserError(f"--settings {unknown[0]}: use some of {', '.join(SETTINGS)}")
    return names


def make_recipe(out: Path, seed: int, *, reduced: bool) -> Recipe:
    """The demo's data and model with one seed, in a folder of its own."""
    folder = out / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    sizes = DemoSizes().reduced() if reduced else SIZES
    spec = BenchmarkSpec(
        seed=seed,
        base_train=sizes.base_conversations,
        safety_train=sizes.safety_conversations,
        eval_per_task=sizes.eval_per_task,
        eval_unsafe=HELD_OUT_REQUESTS,
        eval_benign=HELD_OUT_REQUESTS,
    )
    return Recipe(benchmark=write_benchmark(folder / "data", spec), sizes=sizes, out=folder, num_ranks=2, seed=seed)


def steps_of(recipe: Recipe, name: str) -> Iterator[Command]:
    """Training with one setting, and the scores of its checkpoints."""
    setting, result = SETTINGS[name], scores_path(recipe, name)
    settings = config_of(recipe, name)
    config = write_config(recipe.out / f"{name}.yaml", settings)
    trained_with = result.with_suffix(".trained.yaml")
    is_done = result.exists() and trained_with.exists() and trained_with.read_bytes() == config.read_bytes()
    if not is_done:
        shutil.rmtree(recipe.out / name, ignore_errors=True)
        result.unlink(missing_ok=True)
    title = f"seed {recipe.seed}, {setting.title}"
    seconds = expected_seconds(setting, settings)
    yield Command(title, [*TRAIN, str(config)], recipe.out / f"{name}.log", seconds, is_done)
    interval = setting_interval(recipe, setting)
    steps = dict.fromkeys([*range(interval, recipe.sizes.sft_steps, interval), recipe.sizes.sft_steps])
    named = {START: str(recipe.base)} | {str(step): f"{recipe.out / name}@{step}" for step in steps}
    evaluation = evaluation_step(recipe, named, result, title=f"{title}: scores", seconds=14)
    yield replace(evaluation, is_done=is_done, stamp=(config, trained_with))


def expected_seconds(setting: Setting, settings: Flags) -> float:
    """Batches of replay are larger; a refresh costs about as much as ten steps."""
    steps = int(settings["train-iters"])
    refreshes = -(-steps // int(settings["ogpsa-refresh-interval"])) if setting.projected else 0
    return START_UP + STEP_SECONDS["sft"] * (steps * (1 + setting.replayed) + 10 * refreshes)


def config_of(recipe: Recipe, name: str) -> Flags:
    """The file that trains one setting; it can be run by hand."""
    setting = SETTINGS[name]
    settings = {
        **recipe.start(name, {"ogpsa-refresh-interval": INTERVAL, **setting.flags} if setting.projected else None),
        **recipe.sft(),
        "save-interval": setting_interval(recipe, setting),
    }
    if setting.joined:
        joined, rows = joined_references(recipe)
        settings |= {"ogpsa-reference": {"general": str(joined)}, "ogpsa-reference-samples": rows}
    if setting.replayed:
        batch = recipe.sizes.sft_batch * (1 + setting.replayed)
        settings |= {
            "ogpsa-train-data": str(mixed_data(recipe, setting.replayed)),
            "global-batch-size": batch,
            "micro-batch-size": batch // recipe.num_ranks,
        }
    return settings


def setting_interval(recipe: Recipe, setting: Setting) -> int:
    """Steps between checkpoints; a reduced run has but one."""
    return min(setting.save_interval or recipe.sizes.sft_steps, recipe.sizes.sft_steps)


def reference_rows(recipe: Recipe) -> list[str]:
    """The samples of all references, of the tasks in turn."""
    tasks = [
        recipe.benchmark.reference(task.name).read_text(encoding="utf-8").splitlines()[: recipe.sizes.reference_samples]
        for task in GENERAL_TASKS
    ]
    return [row for rows in zip(*tasks, strict=True) for row in rows]


def joined_references(recipe: Recipe) -> tuple[Path, int]:
    """A file with the samples of all references, and how many they are."""
    rows = reference_rows(recipe)
    path = recipe.benchmark.folder / "references_joined.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path, len(rows)


def mixed_data(recipe: Recipe, replayed: int) -> Path:
    """Safety data with so many reference rows, of all tasks in turn, after each row."""
    safety = recipe.benchmark.safety_train.read_text(encoding="utf-8").splitlines()
    general = reference_rows(recipe)
    mixed = []
    for index, row in enumerate(safety):
        first = index * replayed
        mixed += [row, *(general[(first + offset) % len(general)] for offset in range(replayed))]
    path = recipe.benchmark.folder / f"safety_with_{replayed}_general.jsonl"
    path.write_text("\n".join(mixed) + "\n", encoding="utf-8")
    return path


def scores_path(recipe: Recipe, name: str) -> Path:
    """What the evaluation of one setting's checkpoints writes."""
    return recipe.out / f"{name}.scores.json"


def curve_of(recipe: Recipe, name: str) -> Curve:
    """The scored checkpoints of one run, the starting model first."""
    scored = json.loads(scores_path(recipe, name).read_text(encoding="utf-8"))
    found = {0 if key == START else int(key): Scores.from_json(fields) for key, fields in scored.items()}
    return [
        Point(
            step=step,
            unsafe_refused=scores.unsafe_refused,
            benign_refused=scores.benign_refused,
            general_accuracy=scores.general_accuracy,
            general_loss=scores.general_loss,
        )
        for step, scores in sorted(found.items())
    ]
