"""``megatron-ogpsa train CONFIG.yaml [--flag value ...]``: fine-tune, as a rank of torchrun or by starting this node's.

A configuration with ``stages`` is a pipeline: its stages run one after the other, finished ones are skipped, and a stage
that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ogpsa.cli.connections import set_connections
from megatron_ogpsa.cluster.meant import require_meant_as_rank
from megatron_ogpsa.cluster.restarts import require_resumable, require_resumable_ranks
from megatron_ogpsa.cluster.settings import FLAGS, LaunchSettings, launch_settings
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.pipeline import progress
from megatron_ogpsa.pipeline.plan import Stage, plan_stages
from megatron_ogpsa.system.open_files import raise_limit
from megatron_ogpsa.system.processes import end_with_starter, is_rank, require_common_count

STAGE_VARIABLE = "MEGATRON_OGPSA_STAGE"
"""Name of the stage that this process is to run; set for the processes that the command starts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration and how many ranks to start; everything else is one of Megatron's flags or ours."""
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.yaml", help="keys are flags of Megatron and --ogpsa-* flags"
    )
    group = parser.add_argument_group("starting ranks", "not under torchrun, which has its own; see docs/launching.md")
    for key, (values, meaning) in FLAGS.items():
        group.add_argument(f"--{key}", metavar=values, help=meaning)
    parser.add_argument("--stage", metavar="NAME", help="of a file with stages: run this one alone")
    flags = parser.add_argument(
        "flags", nargs=argparse.REMAINDER, metavar="--flag value", help="flags that win over the file"
    )
    flags.required = False  # argparse would name them as missing where the configuration is


def run(args: argparse.Namespace) -> int:
    """Under torchrun: be a rank. Otherwise start the ranks of this node and return their exit code.

    Raises:
        UserError: a mistake in the configuration, the flags, the environment or the data.
    """
    config = ConfigFile.read(args.config)
    own, flags = _split(args.flags)
    only = own.stage or args.stage
    if only and not config.stages:
        raise UserError(f"--stage {only}: {args.config} has no 'stages': leave the flag out")
    given = {key: _of(own, key) or _of(args, key) for key in FLAGS}
    written = {key: text for key, text in given.items() if text}
    if is_rank():
        require_meant_as_rank(written, config.launch)
        end_with_starter()
        raise_limit()
        require_common_count()
        require_resumable_ranks(config, flags)
        set_connections(config, flags)
        return _run_as_rank(config, flags, only)
    settings = launch_settings(written, config.launch, os.environ, run_id=config.run_id)
    require_resumable(config, flags, settings)
    return _start_ranks(config, flags, only, settings)


def _run_as_rank(config: ConfigFile, flags: list[str], only: str | None) -> int:
    if not config.stages:
        return _run_single(config, flags)
    stages = plan_stages(config, flags)
    if name := os.environ.get(STAGE_VARIABLE):
        return _run_stage(stages, name)
    return _run_as_rank_of_job(_chosen(stages, only), _command(config, flags))


def _start_ranks(config: ConfigFile, flags: list[str], only: str | None, settings: LaunchSettings) -> int:
    from megatron_ogpsa.cli.launching import launch

    if not config.stages:
        return launch(_command(config, flags), settings=settings)
    chosen = _chosen(plan_stages(config, flags), only)
    if settings.max_nodes > 1:  # nodes may see the folders differently: rank 0 looks, and tells the others
        return launch(_command(config, [*flags, *(("--stage", only) if only else ())]), settings=settings)
    told: list[signal.Signals] = []
    return run_in_order(
        chosen,
        look=_state,
        run_stage=lambda stage: launch(
            _command(config, flags),
            settings=settings,
            environment={STAGE_VARIABLE: stage.name},
            on_signal=told.append,
        ),
        is_told=lambda: bool(told),
        say=lambda text: print(text, flush=True),
    )


def run_in_order(
    stages: Sequence[Stage],
    *,
    look: Callable[[Stage], tuple[progress.State, list[str]]],
    run_stage: Callable[[Stage], int],
    is_told: Callable[[], bool],
    say: Callable[[str], None],
) -> int:
    """Run what is not finished, until a stage ends early, or a signal has come.

    Args:
        look: state of a stage, and its flags that are no longer what they were.
        run_stage: returns an exit code.
        is_told: whether a signal asked the last stage to end, which it may have come too late for.
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
        if is_told():
            say(f"{title} is not started, because a signal has come: run the same command to go on")
            return 0
        say(f"{title} goes on{note}" if state == "begun" else f"{title} begins")
        if code := run_stage(stage):
            return code
        if look(stage)[0] != "finished":
            say(f"{title} has stopped before its last step: run the same command to go on")
            return 0
    return 0


def _command(config: ConfigFile, flags: list[str]) -> list[str]:
    return ["train", str(config.path), *flags]


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

    with JobRank() as job:
        return run_in_order(
            stages,
            look=lambda stage: job.told_by_first(lambda: _state(stage)),
            run_stage=lambda stage: job.run_process(["-u", "-m", RANK_MODULE, *command], {STAGE_VARIABLE: stage.name}),
            is_told=job.is_told,
            say=lambda text: print(text, flush=True) if job.rank == 0 else None,
        )


def _run_stage(stages: tuple[Stage, ...], name: str) -> int:
    """Be a rank of one stage."""
    index = next(number for number, stage in enumerate(stages) if stage.name == name)
    stage, is_first = stages[index], os.environ["RANK"] == "0"

    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
    from megatron_ogpsa.integration.arguments.stage import check_parsed, require_data
    from megatron_ogpsa.integration.program import run_training

    parser = build_parser()
    for later in stages[index:]:  # a mistake in the last stage is told now, not after the first one
        args = parse_flags(later.flags(parser))
        check_parsed(args)
        if is_first:  # which reads them; others may not have them
            require_data(args)
    if is_first:
        progress.begin(stage)
    run_training(stage.flags(parser))
    if is_first:
        progress.finish(stage)
    return 0


def _run_single(config: ConfigFile, overrides: list[str]) -> int:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.arguments.parser import build_parser, parse_flags
    from megatron_ogpsa.integration.arguments.stage import check_parsed, require_data
    from megatron_ogpsa.integration.program import run_training

    flags = config.as_flags(build_parser(), overrides)
    args = parse_flags(flags)
    check_parsed(args)
    if os.environ["RANK"] == "0":  # which reads it; others may not have it
        require_data(args)
    run_training(flags)
    return 0


def _split(flags: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This command's own flags, which may stand among the others, and the others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in (*FLAGS, "stage"):
        parser.add_argument(f"--{key}")
    return parser.parse_known_args(flags)


def _of(args: argparse.Namespace, key: str) -> str | None:
    text: str | None = getattr(args, key.replace("-", "_"))
    return text
