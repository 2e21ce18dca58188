"""Entry point of ``megatron-ogpsa <verb>``: finds the verb's module, and turns user errors into one line and exit code 2."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from megatron_ogpsa.cluster.settings import FLAGS as LAUNCH_FLAGS
from megatron_ogpsa.console.telling import tell_once
from megatron_ogpsa.errors import UserError

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


TAKE_FLAGS = ("train", "evaluate", "plan", "doctor")
"""Verbs that take a configuration and any of Megatron's flags and ours after it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0, or 2 for a mistake of the user's (1 if it may pass), told in one line.

    141, as of other programs, if whoever reads the output has gone: ``megatron-ogpsa doctor | head -1``. Ctrl-C ends the
    process by its signal, with a line in place of a traceback; a rank's says where the rank was.
    (Ranks that hang end with 3, without coming here: see :mod:`megatron_ogpsa.watchdog`.)
    """
    try:
        exit_code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        _write_no_more()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        if "RANK" not in os.environ:
            print("\nmegatron-ogpsa: interrupted", file=sys.stderr)  # a line of progress may be on
            sys.excepthook = lambda *_: None
        raise  # Python then ends by SIGINT, at which a shell ends its loop too
    except OSError as error:
        if _takes_output():
            raise
        _write_no_more()
        tell_once(f"the output cannot be written ({error.strerror}): make room, or send it elsewhere")
        return 1
    return exit_code


def _takes_output() -> bool:
    """Whether it is not the file that the output goes to of which an error is: such an error has no file's name."""
    try:
        print(flush=True)
    except OSError:
        return False
    return True


def _write_no_more() -> None:
    """What is left is written when Python ends, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: list[str]) -> int:
    if _asks_for_flags(argv):
        return _show_flags()
    summary = "Safety post-training on Megatron-Core with orthogonal gradient projection (OGPSA)."
    parser = argparse.ArgumentParser(prog="megatron-ogpsa", description=summary)
    if argv[:1] == ["--version"]:
        print(f"megatron-ogpsa {version('megatron-ogpsa')}")
        return 0
    parser.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help="show the version and exit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, (_, summary) in VERBS.items():
        verb_parser = verbs.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # the others are not even imported
            import_module(VERBS[name][0]).add_arguments(verb_parser)
            if name in TAKE_FLAGS:
                verb_parser.epilog = "megatron-ogpsa train CONFIG.yaml --help lists all flags, --ogpsa-* at its end."
                if {"-h", "--help"} & set(argv):
                    argv = [name, "--help"]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        first = ": give CONFIG.yaml first, and flags after it" if args.verb in TAKE_FLAGS else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{first}")
    try:
        _require_temporary_folder()
        return int(import_module(VERBS[args.verb][0]).run(args))
    except UserError as error:
        if error.is_alike:
            tell_once(str(error))
        return error.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        from megatron_ogpsa.cluster.failures import record_failure  # which imports torch: --help does without

        record_failure(error)
        raise


def _require_temporary_folder() -> None:
    try:
        tempfile.gettempdir()
    except FileNotFoundError:  # of all that Python tries, this folder included; torch would ask as it is imported
        raise UserError("no folder for temporary files can be written to: set TMPDIR to one that can") from None


def _asks_for_flags(argv: list[str]) -> bool:
    """``train CONFIG.yaml --help``; ``train --help`` is the verb's own, which other verbs show for both."""
    if argv[:1] != ["train"] or {"-h", "--help"}.isdisjoint(argv):
        return False
    before = (*LAUNCH_FLAGS, "stage")  # these may stand before the file: launch/train.sh gives --nnodes 1 so
    words = iter(argv[1:])
    for word in words:
        if not word.startswith("-"):
            return True
        if word.removeprefix("--") in before:
            next(words, None)
    return False


def _show_flags() -> int:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments.parser import build_parser

    build_parser().print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
