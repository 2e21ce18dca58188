"""Entry point of ``megatron-ogpsa <verb>``: finds the verb's module, and turns user errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from megatron_ogpsa.cluster.failures import record_failure
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.telling import ERRORS_VARIABLE as ERRORS_VARIABLE
from megatron_ogpsa.telling import tell_once

VERBS = {
    "train": ("megatron_ogpsa.cli.train", "fine-tune from a configuration file"),
    "evaluate": ("megatron_ogpsa.cli.evaluate", "losses and refusals of a checkpoint, in any layout"),
    "convert": ("megatron_ogpsa.cli.convert", "Hugging Face folder to Megatron checkpoint, or back"),
    "plan": ("megatron_ogpsa.cli.plan", "what the projection adds to a run on a cluster, without the cluster"),
    "doctor": ("megatron_ogpsa.cli.doctor", "what is wrong with this machine, a configuration and its data"),
    "data": ("megatron_ogpsa.cli.data", "the paper's public data sets as training and reference data"),
    "laptop": (
        "megatron_ogpsa.cli.laptop",
        "take a small instruct model through SFT and DPO on a CPU, and chat with it",
    ),
    "demo": ("megatron_ogpsa.cli.demo", "see the alignment tax, and what projection recovers of it, on a small model"),
    "study": ("megatron_ogpsa.cli.study", "compare settings of the projection at equal safety, over seeds"),
}
"""Verb → module with ``add_arguments(parser)`` and ``run(args) -> int``, and what ``--help`` says of it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for a mistake of the user's, which is told in one line.

    (Ranks that hang end with 3, without coming here: see :mod:`megatron_ogpsa.watchdog`.)
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    summary = "Safety post-training on Megatron-Core with orthogonal gradient projection (OGPSA)."
    parser = argparse.ArgumentParser(prog="megatron-ogpsa", description=summary)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (_, summary) in VERBS.items():
        verb_parser = verbs.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # the others are not even imported
            import_module(VERBS[name][0]).add_arguments(verb_parser)
    args = parser.parse_args(argv)
    try:
        return int(import_module(VERBS[args.verb][0]).run(args))
    except UserError as error:
        tell_once(str(error))
        return error.exit_code
    except Exception as error:
        record_failure(error)
        raise


if __name__ == "__main__":
    sys.exit(main())
