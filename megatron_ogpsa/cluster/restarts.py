"""Restarts make sense for a run that goes on from its checkpoints: others would silently begin anew."""

from __future__ import annotations

import argparse

from megatron_ogpsa.cli.config_file import ConfigFile
from megatron_ogpsa.errors import UserError

_REMEDY = "give save and load the same folder, and name the weights to begin with as pretrained-checkpoint"


def require_resumable(config: ConfigFile, overrides: list[str], max_restarts: int) -> None:
    """Check that ranks which are started again find what they have saved.

    Args:
        config: of a single run; the stages of a pipeline go on from their own folders anyway.
        overrides: flags of the command line, which win over the file's.

    Raises:
        UserError: a restart would begin anew.
    """
    if max_restarts == 0 or config.stages:
        return
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--save")
    parser.add_argument("--load")
    parser.add_argument("--finetune", action="store_true")
    given, _ = parser.parse_known_args(overrides)
    written = {entry.key: entry.value for entry in config.entries}
    save, load = given.save or written.get("save"), given.load or written.get("load")
    restarts = f"--max-restarts {max_restarts}: ranks that are started again would begin anew, because"
    if not save:
        raise UserError(f"{restarts} {config.path} saves no checkpoints: {_REMEDY}")
    if str(load) != str(save):
        raise UserError(f"{restarts} load is {load or 'not given'} and save is {save}: {_REMEDY}")
    if given.finetune or written.get("finetune") is True:
        raise UserError(f"{restarts} finetune loads the weights alone: leave it out; {_REMEDY}")
