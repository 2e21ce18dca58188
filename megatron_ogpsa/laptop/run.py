"""The verb ``laptop``: every setting with every seed, then a report; what an earlier run has scored is not run again."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import fields
from pathlib import Path

from megatron_ogpsa.console.commands import run_commands
from megatron_ogpsa.data.sources import require_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.laptop.jobs import Job, chatting_steps, start_result, starting_steps
from megatron_ogpsa.laptop.recipe import ROWS, Recipe, Sizes, keep_model
from megatron_ogpsa.laptop.report import read_curve, terminal_table, write_report
from megatron_ogpsa.study.run import chosen_settings
from megatron_ogpsa.study.settings import SETTINGS
from megatron_ogpsa.study.tradeoff import Curve

CHAT_FILE = "chat.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the conversations to protect, what is compared, and how long to train."""
    sizes = Sizes()
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder of a small instruct model")
    parser.add_argument(
        "--general",
        required=True,
        metavar="SOURCE",
        help="general conversations, of which some are protected and others scored",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/laptop"), help="output folder (default: runs/laptop)")
    parser.add_argument(
        "--settings",
        default="update-conflict",
        metavar="NAME,…",
        help=f"of {', '.join(_possible())} (default: update-conflict alone); several are compared with plain",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 to N (default: 1)")
    for flag, meaning in (
        ("sft-steps", f"of two packed rows (default: {sizes.sft_steps})"),
        ("dpo-steps", f"of four packed rows of pairs (default: {sizes.dpo_steps})"),
        ("save-interval", f"steps between scored checkpoints (default: {sizes.save_interval})"),
        ("refresh-interval", f"steps between refreshes of what is protected (default: {sizes.refresh_interval})"),
        ("refresh-warmup", f"first steps of each stage with a refresh before each (default: {sizes.refresh_warmup})"),
        ("references", f"conversations protected (default: {sizes.references})"),
        ("parts", f"gradients that are protected, each of a part of these conversations (default: {sizes.parts})"),
    ):
        default = getattr(sizes, flag.replace("-", "_"))
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=meaning)
    for stage in ("sft", "dpo"):
        rate = getattr(sizes, f"{stage}_lr")
        parser.add_argument(
            f"--{stage}-lr", type=float, default=rate, metavar="RATE", help=f"peak rate (default: {rate:g})"
        )
    parser.add_argument(
        "--early-refreshes",
        action=argparse.BooleanOptionalAction,
        default=sizes.early_refreshes,
        help="refresh after 1, 2, 4, 6, 9, ... steps as well, until --refresh-interval is reached: train's "
        "--ogpsa-early-refreshes (default: yes; no with --adaptive-interval)",
    )
    parser.add_argument(
        "--adaptive-interval",
        type=float,
        metavar="SHARE",
        help="refresh every 1 to --refresh-interval steps, so that this share of what is protected stays in the basis: "
        "train's --ogpsa-adaptive-interval (default: no)",
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="faster on CPUs that multiply bfloat16 (avx512_bf16, amx_bf16), slower on others",
    )
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks, data-parallel: 1 or 2 (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Convert, then train and score each setting, convert back, chat, report.

    Raises:
        CommandFailed: a step failed, after the end of its log was printed.
        UserError: no such model or data, a number that cannot be, or the output folder holds a run with other data or from
            another model.
    """
    started = time.monotonic()
    names, recipes, model = _names(args.settings), _recipes(args), args.model.resolve()
    try:
        for recipe in recipes:
            recipe.write_data()
        keep_model(recipes[0].out, model)
        jobs = [Job.of(recipe, name, SETTINGS[name]) for name in names for recipe in recipes]
        asked = [job for job in jobs if job.recipe is recipes[0]]
        out, sizes = recipes[0].out, recipes[0].sizes
        chat = list(chatting_steps(asked, model, out / CHAT_FILE))
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}): choose another folder") from None
    run_commands([*starting_steps(jobs[0], model), *(step for job in jobs for step in job.steps()), *chat], on_cpu=True)
    told = (out / CHAT_FILE).read_text(encoding="utf-8").splitlines()
    print("\n".join(line for line in told if line.startswith(("? ", "  ")) or not line))
    curves: dict[str, dict[int, Curve]] = {name: {} for name in names}
    for job in jobs:
        curves[job.name][job.recipe.seed] = read_curve(start_result(job.recipe), job.result, sizes)
    print(f"\n{terminal_table(curves, sizes)}")
    paths = write_report(curves, sizes, out / "report")
    print(f"\nreport: {', '.join(map(str, paths))}")
    print(f"models: {', '.join(str(job.recipe.exported(job.name)) for job in asked)}")
    print(f"took {time.monotonic() - started:.0f} s on {os.cpu_count()} cores")
    return 0


def _possible() -> list[str]:
    """Of the study's settings those that do not change data, references or the interval, which are the recipe's here."""
    own = {"ogpsa-refresh-interval", "ogpsa-reference-samples"}
    return [
        n for n, setting in SETTINGS.items() if not (setting.replayed or setting.joined or own & setting.flags.keys())
    ]


def _names(text: str) -> list[str]:
    names = text.split(",") if "," not in text else chosen_settings(text)
    if unknown := [name for name in names if name not in _possible()]:
        raise UserError(f"--settings {unknown[0]}: use some of {', '.join(_possible())}")
    return names


def _recipes(args: argparse.Namespace) -> list[Recipe]:
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: has no config.json: name the Hugging Face folder of an instruct model")
    try:
        require_source(args.general)
    except UserError as error:
        raise UserError(f"--general: {error}") from None
    for flag in (
        "seeds",
        "sft_steps",
        "dpo_steps",
        "save_interval",
        "refresh_interval",
        "references",
        "parts",
        "nproc",
    ):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: use 1 or more")
    if any(rows % args.nproc for rows in ROWS.values()):
        raise UserError(f"--nproc {args.nproc}: a step of SFT has {ROWS['sft']} rows for them to share: use 1 or 2")
    if args.refresh_warmup < 0:
        raise UserError(f"--refresh-warmup {args.refresh_warmup}: use 0 or more")
    for flag in ("sft_lr", "dpo_lr"):
        if not 0 < getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: use a rate such as 1e-5")
    if args.adaptive_interval is not None and not 0 < args.adaptive_interval < 1:
        raise UserError(f"--adaptive-interval {args.adaptive_interval:g}: use a share such as 0.5")
    if args.parts > args.references:
        raise UserError(
            f"--parts {args.parts}: is more than --references {args.references}: each part wants a conversation"
        )
    general = str(Path(args.general).resolve()) if Path(args.general).exists() else args.general
    sizes = Sizes(**{field.name: getattr(args, field.name) for field in fields(Sizes) if field.name in args})
    out: Path = args.out.resolve()
    return [
        Recipe(out=out, seed=seed, general=general, num_ranks=args.nproc, sizes=sizes)
        for seed in range(1, args.seeds + 1)
    ]
