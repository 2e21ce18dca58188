"""``megatron-ogpsa`` whose rank 1 loses the process that writes its checkpoints, by SIGKILL, where ``KILL`` says."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from megatron_ogpsa.cli import launching, main

_RANK = os.getpid()
_TARGETS = {
    "idle": "megatron.training.training:training_log",
    "copying": "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.preload_tensors",
    "writing": "megatron_ogpsa.integration.checkpoints.saving:_write_and_hash",
}


def _killing(original: Callable[..., Any]) -> Callable[..., Any]:
    """In the writer it kills itself; in the rank it kills the writer."""

    @wraps(original)  # it is sent to the writer by its name
    def kill(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        if os.getpid() != _RANK:
            os.kill(os.getpid(), signal.SIGKILL)
        if (writer := PersistentAsyncCaller._persistent_process) is not None:
            writer.kill()
            writer.join()
        return original(*args, **kwargs)

    return kill


if os.environ.get("RANK") == "1":
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.runtime.patching import resolve

    owner, name = resolve(_TARGETS[os.environ["KILL"]])
    killing = _killing(getattr(owner, name))
    setattr(owner, name, staticmethod(killing) if os.environ["KILL"] == "copying" else killing)

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.killed_writer"
    sys.exit(main.main())
