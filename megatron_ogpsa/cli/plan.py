"""``megatron-ogpsa plan CONFIG.yaml --nodes N --gpus-per-node G``: what the projection adds on a cluster, before it runs.

Takes no GPU and no data. The ranks that it adds up are built by Megatron itself on torch's meta device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.console.progress import with_progress
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline.plan import plan_stages

if TYPE_CHECKING:
    from megatron_ogpsa.planning.plan import Plan

H100_BANDWIDTH = 3350.0
"""GB/s of the SXM module's memory, from NVIDIA's data sheet."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, the cluster, and the form of the answer."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="as for megatron-ogpsa train")
    _add_own(parser)
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file")


def _add_own(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=_positive, metavar="N", help="machines (default: 1)")
    parser.add_argument("--gpus-per-node", type=_positive, metavar="G", help="ranks on each (default: 8)")
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages: plan this one alone")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument(
        "--memory-bandwidth",
        type=float,
        metavar="GB/s",
        help=f"of a GPU, for the projection's time (default: {H100_BANDWIDTH:.0f}, an H100's)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan of each stage; returns 0.

    Raises:
        UserError: a mistake in the configuration, or a layout that is not possible.
    """
    own = argparse.ArgumentParser(prog="megatron-ogpsa plan CONFIG.yaml", add_help=False, allow_abbrev=False)
    _add_own(own)
    among_flags, flags = own.parse_known_args(args.flags)

    def chosen(name: str, default: Any) -> Any:
        return getattr(among_flags, name) or getattr(args, name) or default

    config = ConfigFile.read(args.config)
    nodes, gpus = chosen("nodes", 1), chosen("gpus_per_node", 8)
    cluster = f"{nodes} node{'s' * (nodes > 1)} with {gpus} GPU{'s' * (gpus > 1)}{' each' * (nodes > 1)}"
    plans = {}
    for name, flags_of in _runs(config, flags, chosen("stage", None)).items():
        title = f"{args.config}{f', stage {name}' if name else ''}, on {cluster}"
        plans[name] = (title, _planned(flags_of, nodes * gpus))
    if chosen("json", False):
        figures = {name: plan.as_json() for name, (_, plan) in plans.items()}
        print(json.dumps(figures if config.stages else figures[""], indent=2))
        return 0
    from megatron_ogpsa.planning.report import as_text

    bandwidth = chosen("memory_bandwidth", H100_BANDWIDTH)
    print("\n\n".join(as_text(plan, title=title, bandwidth=bandwidth) for title, plan in plans.values()))
    return 0


FlagsOf = Callable[[argparse.ArgumentParser], list[str]]
"""From the parser of all flags that a configuration may name to the flags of one run."""


def _runs(config: ConfigFile, overrides: list[str], only: str | None) -> dict[str, FlagsOf]:
    """The runs to plan by the stage's name; a file without stages is one run without a name."""
    if not config.stages:
        if only:
            raise UserError(f"--stage {only}: {config.path} has no 'stages': leave the flag out")
        return {"": lambda parser: config.as_flags(parser, overrides)}
    if only is not None and only not in config.stages:
        raise UserError(f"--stage {only}: the file has the stages {', '.join(config.stages)}")
    return {stage.name: stage.flags for stage in plan_stages(config, overrides) if only in (None, stage.name)}


def _planned(flags_of: FlagsOf, world_size: int) -> Plan:
    from megatron_ogpsa.integration.runtime.cpu import install_on_meta

    install_on_meta()  # before Megatron is imported: its flags keep a GPU's defaults
    from megatron_ogpsa.integration.arguments.parser import build_parser
    from megatron_ogpsa.planning.arguments import cluster_arguments
    from megatron_ogpsa.planning.plan import make_plan

    args = cluster_arguments(flags_of(build_parser()), world_size)
    return make_plan(args, progress=lambda ranks: with_progress(ranks, "simulating", len(ranks), " ranks"))


def _positive(text: str) -> int:
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value
