"""``megatron-ogpsa doctor [CONFIG.yaml]``: what is wrong with a machine, a configuration and its data, before it runs.

Exit code 0: nothing; 1: warnings; 2: something would fail. Under torchrun every rank takes part in the collectives, the
first one makes the other checks and prints, and all end with the same code.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from megatron_ogpsa.doctor.collectives import SECONDS_PER_RANK, START_SECONDS
from megatron_ogpsa.doctor.examination import Examination, Request
from megatron_ogpsa.doctor.findings import Report
from megatron_ogpsa.doctor.ranks import Connections, JobRanks, LocalRanks
from megatron_ogpsa.system.open_files import raise_limit
from megatron_ogpsa.system.processes import is_rank

DEFAULT_TIMEOUT = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, how many ranks there will be, and the form of the answer."""
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        metavar="CONFIG.yaml",
        help="as for megatron-ogpsa train; without it the machine alone is examined",
    )
    _add_own(parser)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file")


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--nproc-per-node",
        type=_positive,
        metavar="N",
        help="ranks on this machine when not under torchrun (default: launch.nproc-per-node of the file)",
    )
    parser.add_argument(
        "--nnodes", metavar="N|MIN:MAX", help="nodes of the run (default: as in training, NNODES, the file or SLURM)"
    )
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages: examine this one alone")
    parser.add_argument("--json", action="store_true", help="print findings as JSON")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help=f"for each all-reduce, beside {SECONDS_PER_RANK:g} for each of its ranks (default: {DEFAULT_TIMEOUT:.0f}); what "
        f"imports libraries gets as much, and at least {START_SECONDS:.0f}",
    )


def run(args: argparse.Namespace) -> int:
    """Print what is found; returns the exit code of the worst finding."""
    own = argparse.ArgumentParser(prog="megatron-ogpsa doctor CONFIG.yaml", add_help=False, allow_abbrev=False)
    _add_own(own)
    among_flags, flags = own.parse_known_args(args.flags)

    def chosen(name: str) -> Any:
        return getattr(among_flags, name) or getattr(args, name)

    raise_limit()
    connections: LocalRanks | JobRanks
    timeout = chosen("timeout") or DEFAULT_TIMEOUT
    if is_rank():
        connections = JobRanks(timeout=timeout)
        if connections.rank != 0:
            return connections.follow()
    else:
        connections = LocalRanks(timeout=timeout)
    request = Request(
        config=args.config,
        overrides=flags,
        num_ranks=chosen("nproc_per_node"),
        nodes=chosen("nnodes"),
        stage=chosen("stage"),
    )
    return _examine(request, connections, as_json=chosen("json"))


def _examine(request: Request, connections: Connections, *, as_json: bool) -> int:
    report = Report() if as_json else Report(lambda line: print(line, flush=True))
    exit_code = Examination(request, report, connections).make()
    print(json.dumps(report.as_json(), indent=2) if as_json else f"\n{report.summary()}", flush=True)
    connections.end(exit_code)
    return exit_code


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def _seconds(text: str) -> float:
    """More than none, which would find every connection broken."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds above 0")
    return value
