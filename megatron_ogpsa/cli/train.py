"""``megatron-ogpsa train CONFIG.yaml [--flag value ...]``: fine-tune, as a rank of torchrun or by starting the ranks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_ogpsa.cli.config_file import ConfigFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration and how many ranks to start; everything else is one of Megatron's flags or ours."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="keys are flags of Megatron and --ogpsa-* flags"
    )
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="ranks to start on this machine when not under torchrun (default: launch.nproc-per-node of the file, or 1)",
    )
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file")


def run(args: argparse.Namespace) -> int:
    """Under torchrun: be a rank. Otherwise start the ranks and return their exit code.

    Raises:
        UserError: a mistake in the configuration, the flags or the data.
    """
    config = ConfigFile.read(args.config)
    num_ranks, flags = _split(args.flags)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _run_rank(config, flags)
    from megatron_ogpsa.cli.launching import launch

    num_ranks = num_ranks or args.nproc_per_node or config.launch.get("nproc-per-node", 1)
    return launch(["train", str(args.config), *flags], num_ranks=num_ranks)


def _split(flags: list[str]) -> tuple[int | None, list[str]]:
    """``--nproc-per-node``, which may stand among the flags, and the other flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc-per-node", type=int)
    found, others = parser.parse_known_args(flags)
    return found.nproc_per_node, others


def _run_rank(config: ConfigFile, overrides: list[str]) -> int:
    from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments import build_parser
    from megatron_ogpsa.integration.program import run_training

    run_training(config.as_flags(build_parser(), overrides))
    return 0
