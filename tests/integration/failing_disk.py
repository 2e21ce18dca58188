"""``megatron-ogpsa`` whose disk fails where ``FAIL`` says, as rank 0 reaches it: before a save, or within one.

It fails but once, if ``FAIL_ONCE`` names a file by which that is remembered. With ``AS_WITH_NCCL`` leaving the process group
waits for the other ranks, as it may with NCCL.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_ogpsa.cli import launching, main

_PLACE, _, _FOLDER = os.environ.get("FAIL", "").partition(" ")
_RANK_0_ONLY = {
    "metadata": "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
    "configuration": "megatron.core.dist_checkpointing.serialization:save_config",
    "tracker": "megatron.training.checkpointing:get_checkpoint_tracker_filename",
    "reading": "megatron_ogpsa.checkpoints.manifest:_digest",
}
"""What rank 0 writes alone, while the others wait for it, in the order in which it is written; and what it verifies."""


def _failing(original: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        is_in_save = sys._getframe(1).f_code.co_name in ("save_checkpoint", "metadata_finalize_fn")
        if (is_in_save or _PLACE == "metadata" or sys._getframe(1).f_code.co_name == "seen") and _is_to_fail():
            if "AS_WITH_NCCL" in os.environ:
                _wait_when_leaving()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*args, **kwargs)

    return fail


def _wait_when_leaving() -> None:
    import torch.distributed as dist
    from megatron.training import get_args

    get_args().distributed_backend = "nccl"
    dist.destroy_process_group = lambda: time.sleep(600)


def _is_to_fail() -> bool:
    if not (noted := os.environ.get("FAIL_ONCE")):
        return True
    is_first = not Path(noted).exists()
    Path(noted).touch()
    return is_first


def _remounting(original: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def training_log(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # of the second step; the first has been saved
            subprocess.run(["mount", "-o", "remount,ro", _FOLDER], check=True)
        return original(*args, **kwargs)

    return training_log


if os.environ.get("RANK") == "0":
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.runtime.patching import Patch, apply_patches

    if _PLACE == "read-only":
        target, replace = "megatron.training.training:training_log", _remounting
    else:
        target, replace = _RANK_0_ONLY[_PLACE], _failing
    apply_patches([Patch(target=target, reason="a disk that fails", replace=replace)])

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.failing_disk"
    sys.exit(main.main())
