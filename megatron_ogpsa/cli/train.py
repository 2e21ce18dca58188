"""``megatron-ogpsa train CONFIG.yaml [--flag value ...]``: fine-tune, as a rank of torchrun or by starting the ranks.

A configuration with ``stages`` is a pipeline: its stages run one after the other, finished ones are skipped, and a stage
that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ogpsa.cli.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline import progress
from megatron_ogpsa.pipeline.plan import Stage, plan_stages

STAGE_VARIABLE = "MEGATRON_OGPSA_STAGE"
"""Name of the stage that this process is to run; set for the processes that the command starts."""


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
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages: run this one alone")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file")


def run(args: argparse.Namespace) -> int:
    """Under torchrun: be a rank. Otherwise start the ranks and return their exit code.

    Raises:
        UserError: a mistake in the configuration, the flags or the data.
    """
    from megatron_ogpsa.cli.launching import launch

    config = ConfigFile.read(args.config)
    own, flags = _split(args.flags)
    num_ranks = own.nproc_per_node or args.nproc_per_node or config.launch.get("nproc-per-node", 1)
    only = args.stage or own.stage
    is_rank = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    command = ["train", str(args.config), *flags]
    if not config.stages:
        if only:
            raise UserError(f"--stage {only}: {args.config} has no 'stages': leave the flag out")
        return _run_single(config, flags) if is_rank else launch(command, num_ranks=num_ranks)
    stages = plan_stages(config, flags)
    if is_rank and (name := os.environ.get(STAGE_VARIABLE)):
        return _run_stage(stages, name)
    chosen = _chosen(stages, only)
    if is_rank:
        return _run_as_rank_of_job(chosen, command)
    return run_in_order(
        chosen,
        look=_state,
        run_stage=lambda stage: launch(command, num_ranks=num_ranks, environment={STAGE_VARIABLE: stage.name}),
        say=lambda text: print(text, flush=True),
    )


def run_in_order(
    stages: Sequence[Stage],
    *,
    look: Callable[[Stage], tuple[progress.State, list[str]]],
    run_stage: Callable[[Stage], int],
    say: Callable[[str], None],
) -> int:
    """Run what is not finished, until a stage ends early.

    Args:
        look: state of a stage, and its flags that are no longer what they were.
        run_stage: returns an exit code.
        say: tells the user.

    Returns:
        0, or the exit code of the stage that failed. A stage may also end early with 0, when it is told to save and exit.
    """
    for stage in stages:
        title = f"megatron-ogpsa: stage {stage.name} ({stage.folder})"
        state, changed = look(stage)
        note = f"; changed since: {', '.join(changed)}" if changed else ""
        if state == "finished":
            say(f"{title} is finished: skipped{note}" + ("; delete the folder to train it again" if changed else ""))
            continue
        say(f"{title} goes on{note}" if state == "begun" else f"{title} begins")
        if code := run_stage(stage):
            return code
        if look(stage)[0] != "finished":
            say(f"{title} has stopped before its last step: run the same command to go on")
            return 0
    return 0


def _state(stage: Stage) -> tuple[progress.State, list[str]]:
    return progress.state_of(stage), progress.changed_settings(stage)


def _chosen(stages: tuple[Stage, ...], only: str | None) -> tuple[Stage, ...]:
    chosen = tuple(stage for stage in stages if only in (None, stage.name))
    if not chosen:
        raise UserError(f"--stage {only}: the file has the stages {', '.join(stage.name for stage in stages)}")
    return chosen


def _run_as_rank_of_job(stages: Sequence[Stage], command: list[str]) -> int:
    from megatron_ogpsa.cli.launching import RANK_MODULE
    from megatron_ogpsa.pipeline.ranks import JobRank

    job = JobRank()
    return run_in_order(
        stages,
        look=lambda stage: job.told_by_first(lambda: _state(stage)),
        run_stage=lambda stage: job.run_process(["-u", "-m", RANK_MODULE, *command], {STAGE_VARIABLE: stage.name}),
        say=lambda text: print(text, flush=True) if job.rank == 0 else None,
    )


def _run_stage(stages: tuple[Stage, ...], name: str) -> int:
    """Be a rank of one stage."""
    from megatron_ogpsa.pipeline.ranks import end_with_job

    end_with_job()
    index = next(number for number, stage in enumerate(stages) if stage.name == name)
    stage, is_first = stages[index], os.environ["RANK"] == "0"

    from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments import build_parser, parse_flags
    from megatron_ogpsa.integration.program import run_training
    from megatron_ogpsa.integration.stages import require_data

    parser = build_parser()
    for later in stages[index:]:  # a mistake in the last stage is told now, not after the first one
        require_data(parse_flags(later.flags(parser)))
    if is_first:
        progress.begin(stage)
    run_training(stage.flags(parser))
    if is_first:
        progress.finish(stage)
    return 0


def _run_single(config: ConfigFile, overrides: list[str]) -> int:
    from megatron_ogpsa.integration.cpu_runtime import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments import build_parser
    from megatron_ogpsa.integration.program import run_training

    run_training(config.as_flags(build_parser(), overrides))
    return 0


def _split(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, which may stand among the others, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nproc-per-node", type=int)
    parser.add_argument("--stage")
    return parser.parse_known_args(flags)
