"""``megatron-ogpsa data RECIPE --out FILE.jsonl``: the paper's data sets from their public form to ours."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ogpsa.errors import UserError

DEFAULT_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe, where its data set lies, and where the result goes."""
    from megatron_ogpsa.data.recipes import RECIPES

    parser.add_argument(
        "recipe",
        choices=RECIPES,
        metavar="RECIPE",
        help="; ".join(f"{name}: {recipe.summary}" for name, recipe in RECIPES.items()),
    )
    parser.add_argument(
        "--source",
        help="a .jsonl, .json or .parquet file, a folder of save_to_disk, or NAME[:CONFIGURATION][:SPLIT] of the Hub "
        "(default: where the data set is published)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON Lines (default: data/RECIPE.jsonl)")
    parser.add_argument("--num-rows", type=int, metavar="N", help="rows to take (default: the paper's number)")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help=f"which rows (default: {DEFAULT_SEED})")


def run(args: argparse.Namespace) -> int:
    """Write the file and say what was taken and dropped; returns 0.

    Raises:
        UserError: the source is not what the recipe takes, or the file cannot be written.
    """
    from megatron_ogpsa.data.recipes import RECIPES, select, write_selection

    recipe = RECIPES[args.recipe]
    num_rows = recipe.num_rows if args.num_rows is None else args.num_rows
    if num_rows < 1:
        raise UserError(f"--num-rows {num_rows}: take at least one row")
    out = args.out or Path(f"data/{recipe.name}.jsonl")
    source = args.source or recipe.source
    selection = select(recipe, source, num_rows=num_rows, seed=args.seed)
    write_selection(out, selection)
    print(
        f"{out}: {len(selection.rows)} of {selection.fit} rows that fit, of {selection.read} of {source}, seed {args.seed}"
    )
    for reason, number in selection.dropped.items():
        print(f"  dropped {number}: {reason}")
    print(f"  licence of the data set: {recipe.licence}")
    return 0
