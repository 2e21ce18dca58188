"""``CUDA_DEVICE_MAX_CONNECTIONS``, which CUDA reads once, before Megatron asks for it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megatron_ogpsa.configuration.config_file import ConfigFile

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"

_WANT_ONE = ("tensor-model-parallel-size", "context-parallel-size")
_WANT_MORE = ("use-megatron-fsdp", "use-torch-fsdp2", "overlap-moe-expert-parallel-comm")


def set_connections(config: ConfigFile, overrides: Sequence[str]) -> None:
    """In a rank: one queue of work for the GPU where Megatron asks for it, unless the user has said how many.

    Up to Hopper Megatron refuses to split tensors or sequences over ranks without it
    (``validate_args`` in megatron/training/arguments.py): kernels then start in the order in which they are called, so that
    communication overlaps.
    """
    entries = [*config.entries, *(entry for stage in config.stages.values() for entry in stage)]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for key in _WANT_ONE:
        parser.add_argument(f"--{key}")
    for key in _WANT_MORE:
        parser.add_argument(f"--{key}", action="store_true")
    given = vars(parser.parse_known_args(list(overrides))[0])

    def values(key: str) -> list[str]:
        flag = given[key.replace("-", "_")]
        return [str(flag)] if flag else [str(entry.value) for entry in entries if entry.key == key]

    if any(values(key) not in ([], ["False"]) for key in _WANT_MORE):
        return
    if any(value != "1" for key in _WANT_ONE for value in values(key)):
        os.environ.setdefault(VARIABLE, "1")
