"""``megatron-ogpsa convert SOURCE TARGET``: Hugging Face folder to Megatron checkpoint, or back, whichever SOURCE is."""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.system.files import is_there

if TYPE_CHECKING:
    from megatron_ogpsa.conversion.convert import Converted

GIGABYTE = 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two folders, and what to do otherwise than by default."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a Hugging Face folder, or a folder of checkpoints")
    parser.add_argument("target", type=Path, metavar="TARGET", help="a folder that is not there yet, or is empty")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="of the weights (default: as they are in the source)"
    )
    group = parser.add_argument_group("from Megatron")
    group.add_argument(
        "--hf",
        type=Path,
        metavar="FOLDER",
        help="with config.json and tokenizer (default: what the checkpoint carries or was trained with)",
    )
    group.add_argument(
        "--ckpt-step", type=int, metavar="N", help="the checkpoint of step N (default: what the tracker names)"
    )
    group.add_argument(
        "--max-shard-size",
        type=_gigabytes,
        default=5 * GIGABYTE,
        metavar="GB",
        help="of each weights file; inf for one file (default: 5)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert and tell what came of it; returns 0.

    Raises:
        UserError: what is wrong with the source, or with the place to write.
    """
    from megatron_ogpsa.integration.runtime.cpu import install_on_meta

    install_on_meta()  # before Megatron is imported: models of any size are built without memory
    from megatron_ogpsa.conversion.checkpoint_reader import is_checkpoint_folder
    from megatron_ogpsa.conversion.convert import to_hugging_face, to_megatron
    from megatron_ogpsa.conversion.model import dtype_named

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant
    warnings.filterwarnings("ignore", message="The argument order of load has been changed")  # Megatron's call
    dtype = dtype_named(args.dtype) if args.dtype else None
    if not (is_there(args.source) and args.source.is_dir()):
        raise UserError(f"{args.source}: no such folder: name a Hugging Face folder or a folder of checkpoints")
    if is_checkpoint_folder(args.source):
        converted = to_hugging_face(
            args.source,
            args.target,
            hugging_face=args.hf,
            iteration=args.ckpt_step,
            dtype=dtype,
            most_bytes=args.max_shard_size,
        )
        _tell(args.target, "a Hugging Face folder", converted)
        return 0
    _require_no_checkpoints_around(args.source)
    if args.hf is not None or args.ckpt_step is not None:
        raise UserError(f"{args.source}: --hf and --ckpt-step are for folders of checkpoints: leave them out")
    converted = to_megatron(args.source, args.target, dtype=dtype)
    _tell(args.target, "a Megatron checkpoint", converted)
    _tell_use(args.target, converted)
    return 0


def _require_no_checkpoints_around(folder: Path) -> None:
    """Not one checkpoint of a run, nor the folder of a pipeline's stages, which hold no ``config.json`` either."""
    from megatron_ogpsa.conversion.checkpoint_reader import is_checkpoint_folder
    from megatron_ogpsa.conversion.huggingface import CONFIG_FILE

    if (folder / ".metadata").is_file():
        step = folder.name.removeprefix("iter_").lstrip("0")
        which = f" and --ckpt-step {step}" if step.isdecimal() else ""
        raise UserError(
            f"{folder}: is one checkpoint of a run: name the run's folder, {folder.resolve().parent}{which}"
        )
    if is_there(folder / CONFIG_FILE):  # what else lies there, lost+found say, need not be readable
        return
    stages = [inner for inner in sorted(folder.iterdir()) if inner.is_dir() and is_checkpoint_folder(inner)]
    if stages:
        raise UserError(f"{folder}: holds the checkpoints of several stages: name one of them, such as {stages[-1]}")


def _gigabytes(text: str) -> int:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size above 0")
    return sys.maxsize if math.isinf(size) else max(1, int(size * GIGABYTE))


def _tell(target: Path, what: str, converted: Converted) -> None:
    print(f"{target}: {what}, {converted.num_tensors} tensors, {converted.num_bytes / GIGABYTE:.2f} GB")
    for note in converted.notes:
        print(note)


def _tell_use(target: Path, converted: Converted) -> None:
    from megatron_ogpsa.conversion.model_file import MODEL_FILE, as_yaml

    print(
        f"\nIn a configuration 'model: {target}' stands for these flags ({target / MODEL_FILE}), the checkpoint and the"
    )
    print(f"tokenizer:\n\n{as_yaml(converted.flags)}", end="")
