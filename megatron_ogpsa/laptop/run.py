"""The verb ``laptop``: the steps one after the other, with one progress line, and what has changed at the end."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from megatron_ogpsa.data.sources import require_source
from megatron_ogpsa.demo.run import Step, run_steps
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.laptop.recipe import Recipe

COMMAND = [sys.executable, "-m", "megatron_ogpsa.cli.main"]

TABLE_FILE = "evaluation.log"
CHAT_FILE = "chat.log"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the conversations to protect, and how long to train."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Hugging Face folder of a small instruct model")
    parser.add_argument(
        "--general",
        required=True,
        metavar="SOURCE",
        help="general conversations, of which some are protected and others scored",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/laptop"), help="output folder (default: runs/laptop)")
    parser.add_argument("--sft-steps", type=int, default=20, metavar="N", help="of four sequences (default: 20)")
    parser.add_argument("--dpo-steps", type=int, default=10, metavar="N", help="of four pairs (default: 10)")
    parser.add_argument("--references", type=int, default=8, metavar="N", help="conversations protected (default: 8)")
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks, data-parallel (default: 2)")


def run(args: argparse.Namespace) -> int:
    """Convert, train, score before and after, convert back, chat.

    Raises:
        DemoFailed: a step failed, after the end of its log was printed.
        UserError: no such model or data, a number that cannot be, or the output folder holds something.
    """
    started = time.monotonic()
    recipe = _recipe(args)
    model = args.model.resolve()
    try:
        config = recipe.write()
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}): choose another folder") from None
    run_steps(_steps(recipe, model, config))
    told = (recipe.out / CHAT_FILE).read_text(encoding="utf-8").splitlines()
    print("\n".join(line for line in told if line.startswith(("? ", "  ")) or not line))
    scored = (recipe.out / TABLE_FILE).read_text(encoding="utf-8").splitlines()
    header = max(number for number, line in enumerate(scored) if line.split() == ["before", "after"])
    print("\n" + "\n".join(scored[header:]))
    print(f"\nmodel:   {recipe.exported}\nanswers: {recipe.out / 'answers.jsonl'}")
    print(f"took {time.monotonic() - started:.0f} s on {os.cpu_count()} cores")
    return 0


def _recipe(args: argparse.Namespace) -> Recipe:
    if not (args.model / "config.json").is_file():
        raise UserError(f"{args.model}: has no config.json: name the Hugging Face folder of an instruct model")
    try:
        require_source(args.general)
    except UserError as error:
        raise UserError(f"--general: {error}") from None
    for flag in ("sft_steps", "dpo_steps", "references", "nproc"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: use 1 or more")
    out: Path = args.out.resolve()
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {args.out}: is not empty: name another folder, or remove it")
    general = str(Path(args.general).resolve()) if Path(args.general).exists() else args.general
    return Recipe(
        out=out,
        general=general,
        num_ranks=args.nproc,
        sft_steps=args.sft_steps,
        dpo_steps=args.dpo_steps,
        references=args.references,
    )


def _steps(recipe: Recipe, model: Path, config: Path) -> list[Step]:
    """What is run; seconds are those of a model of 135M parameters on two cores."""
    out, start, tuned = recipe.out, str(recipe.start), str(recipe.tuned)
    evaluate = ["evaluate", str(config), "--load", tuned, "--compare", start, "--json", str(out / "scores.json")]
    evaluate += ["--answers", str(out / "answers.jsonl"), "--max-new-tokens", "40"]
    evaluate += [
        "--data",
        f"general={out / 'data/general-held-out.jsonl'}",
        "--data",
        f"safety={out / 'data/safety.jsonl'}",
    ]
    for name in ("unsafe", "benign"):
        evaluate += ["--prompts", f"{name}={out / 'data' / name}.jsonl"]
    train = 40 + 14.0 * recipe.sft_steps + 25.0 * recipe.dpo_steps
    return [
        Step("to Megatron", [*COMMAND, "convert", str(model), start], out / "to-megatron.log", 15),
        Step("SFT and DPO", [*COMMAND, "train", str(config)], out / "training.log", train),
        Step("scores", [*COMMAND, *evaluate], out / TABLE_FILE, 120),
        Step(
            "back to Hugging Face",
            [*COMMAND, "convert", tuned, str(recipe.exported), "--hf", str(model), "--dtype", "fp32"],
            out / "to-huggingface.log",
            15,
        ),
        Step(
            "chat",
            [sys.executable, "-m", "megatron_ogpsa.laptop.chat", str(model), str(recipe.exported)],
            out / CHAT_FILE,
            60,
        ),
    ]
