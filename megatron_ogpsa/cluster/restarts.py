"""Restarts make sense for a run that goes on from its checkpoints: others would silently begin anew."""

from __future__ import annotations

import argparse
import os

from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError

_REMEDY = "give save and load the same folder, and name the weights to begin with as pretrained-checkpoint"


def require_resumable(config: ConfigFile, overrides: list[str], settings: LaunchSettings) -> None:
    """Check that ranks which are started again find what they have saved.

    Args:
        config: of a single run; the stages of a pipeline go on from their own folders anyway.
        overrides: flags of the command line, which win over the file's.

    Raises:
        UserError: a restart would begin anew.
    """
    if settings.max_restarts:
        _require_resumable(config, overrides, f"--max-restarts {settings.max_restarts}")
    elif settings.min_nodes != settings.max_nodes:  # as often as nodes come or go, which counts as no restart
        _require_resumable(config, overrides, f"--nnodes {settings.min_nodes}:{settings.max_nodes}")


def require_resumable_ranks(config: ConfigFile, overrides: list[str]) -> None:
    """The same in a rank, of what torchrun or SLURM restarts.

    Raises:
        UserError: a restart would begin anew, or this one does.
    """
    if restarts := int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        _require_resumable(config, overrides, f"--max-restarts {restarts}")
    if int(os.environ.get("SLURM_RESTART_COUNT", "0")):
        _require_resumable(config, overrides, "SLURM has started this job again (--requeue)")


def _require_resumable(config: ConfigFile, overrides: list[str], why: str) -> None:
    if config.stages:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--ckpt-step")
    parser.add_argument("--finetune", action="store_true")
    given, _ = parser.parse_known_args(overrides)
    written = {entry.key: entry.value for entry in config.entries}
    save, load = given.save or written.get("save"), given.load or written.get("load")
    restarts = f"{why}: ranks that are started again would begin anew, because"
    if not save:
        raise UserError(f"{restarts} {config.path} saves no checkpoints: {_REMEDY}")
    if not load or os.path.abspath(str(load)) != os.path.abspath(str(save)):
        raise UserError(f"{restarts} load is {load or 'not given'} and save is {save}: {_REMEDY}")
    if given.finetune or written.get("finetune") is True:
        raise UserError(f"{restarts} finetune loads the weights alone: leave it out; {_REMEDY}")
    if step := given.ckpt_step or written.get("ckpt-step"):
        raise UserError(
            f"{why}: ranks that are started again would go back to step {step} each time, because ckpt-step names it: leave "
            "it out once the run has saved a later one; to go back for good, move later checkpoints away"
        )
