"""``megatron-ogpsa evaluate CONFIG.yaml --load FOLDER``: losses and refusals of a checkpoint, in any layout.

As a rank of torchrun, or by starting this node's ranks as ``train`` does. Exit code 0, or 2 for a mistake of the user's.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_ogpsa.cli.connections import set_connections
from megatron_ogpsa.cluster.meant import require_meant_as_rank
from megatron_ogpsa.cluster.settings import FLAGS, launch_settings
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.evaluation.request import Request, add_request_arguments
from megatron_ogpsa.system.open_files import raise_limit
from megatron_ogpsa.system.processes import end_with_starter, is_rank, require_common_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, what is to be scored, and how many ranks to start; the rest are Megatron's flags."""
    parser.usage = "megatron-ogpsa evaluate CONFIG.yaml --load FOLDER --data NAME=SOURCE [--flag value ...]"
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="as for megatron-ogpsa train: the model, tokenizer and layout"
    )
    add_request_arguments(parser.add_argument_group("scores", "after CONFIG.yaml; see docs/evaluation.md"))
    parser.add_argument_group("checkpoint").add_argument(
        "--load", metavar="FOLDER", help="of checkpoints, as Megatron's"
    )
    group = parser.add_argument_group("starting ranks", "not under torchrun, which has its own; see docs/launching.md")
    _add_starting(group)
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages: take this one's flags (the last one's)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file")


def run(args: argparse.Namespace) -> int:
    """Under torchrun: be a rank. Otherwise start the ranks of this node and return their exit code.

    Raises:
        UserError: a mistake in flags, configuration, checkpoint or data.
    """
    before = [key for key, value in vars(args).items() if value is not None and key not in ("verb", "config", "flags")]
    if before:
        raise UserError(f"--{before[0].replace('_', '-')} stands before {args.config}: give the configuration first")
    starting, flags = _starting_parser().parse_known_args(args.flags)
    config = ConfigFile.read(args.config)
    given = {key: value for key in FLAGS if (value := getattr(starting, key.replace("-", "_")))}
    if is_rank():
        require_meant_as_rank(given, config.launch)
        end_with_starter()
        raise_limit()
        require_common_count()
        set_connections(config, flags)
        return _run_as_rank(config, flags)
    Request.of(_own(flags)[0], judges_here=False)  # a mistake is told before any rank is started
    from megatron_ogpsa.cli.launching import launch

    settings = launch_settings(given, config.launch, os.environ, run_id=config.run_id)
    return launch(["evaluate", str(args.config), *flags], settings=settings)


def _run_as_rank(config: ConfigFile, flags: list[str]) -> int:
    own, overrides = _own(flags)
    request = Request.of(own, judges_here=os.environ["RANK"] == "0")
    if config.stages:
        name = own.stage or list(config.stages)[-1]
        if name not in config.stages:
            raise UserError(f"--stage {name}: the file has the stages {', '.join(config.stages)}")
        config = config.stage(name)
    elif own.stage:
        raise UserError(f"--stage {own.stage}: {config.path} has no 'stages': leave the flag out")

    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    import torch.distributed as dist

    from megatron_ogpsa.evaluation.results import Results
    from megatron_ogpsa.evaluation.scoring import check_flags, score_checkpoints
    from megatron_ogpsa.integration.arguments.parser import build_parser
    from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
    from megatron_ogpsa.integration.loop.hang_watch import watched

    model = LoadedModel.build(config.as_flags(build_parser(), overrides), check=lambda args: check_flags(args, request))
    with watched(model.args), Results(request) as results:
        score_checkpoints(model, request, results)
    dist.destroy_process_group()
    return 0


def _own(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, which may stand among Megatron's, and the others."""
    parser = argparse.ArgumentParser(prog="megatron-ogpsa evaluate", add_help=False, allow_abbrev=False)
    add_request_arguments(parser)
    parser.add_argument("--stage")
    return parser.parse_known_args(flags)


def _starting_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-ogpsa evaluate", add_help=False, allow_abbrev=False)
    _add_starting(parser)
    return parser


def _add_starting(parser: argparse._ActionsContainer) -> None:
    for key, (values, meaning) in FLAGS.items():
        parser.add_argument(f"--{key}", metavar=values, help=meaning)
