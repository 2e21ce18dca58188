"""``megatron-ogpsa`` of which one rank misbehaves at a collective, as ``FREEZE`` says: ``RANK|STEP|PHASE|HOW``.

``stop``: it stops itself (SIGSTOP). ``loop``: it computes for ever. ``raise``: it raises. ``sleep``: it takes its time in
its first step. Each rank leaves its process id in a file ``rank-N``, and the rank that
misbehaves the time in a file ``frozen``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

from megatron_ogpsa.cli import launching, main

COLLECTIVES = ("all_reduce", "all_gather_object", "barrier", "broadcast_object_list", "gather_object")
SLEEP_SECONDS = 2.0

_RANK, _STEP, _PHASE, _HOW = os.environ["FREEZE"].split("|")
_slept: list[bool] = []


def compute_for_ever() -> None:
    number = 0
    while True:
        number += 1


def misbehave() -> None:
    from megatron_ogpsa.watchdog import progress

    if "sleep" in _HOW and progress.phase == "step" and not _slept:
        _slept.append(True)
        time.sleep(SLEEP_SECONDS)
    if progress.phase != _PHASE or progress.step != int(_STEP):
        return
    Path("frozen").write_text(str(time.time()), encoding="utf-8")
    if "stop" in _HOW:
        os.kill(os.getpid(), signal.SIGSTOP)
    elif _HOW == "loop":
        compute_for_ever()
    elif _HOW == "raise":
        raise MemoryError("not enough room for rank 1")


if rank := os.environ.get("RANK"):
    Path(f"rank-{rank}").write_text(str(os.getpid()), encoding="utf-8")
    if rank == _RANK:
        from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

        install_if_no_gpu()
        import torch.distributed as dist

        def misbehaving(original: Any) -> Any:
            @wraps(original)
            def collective(*args: Any, **kwargs: Any) -> Any:
                misbehave()
                return original(*args, **kwargs)

            return collective

        for name in COLLECTIVES:
            setattr(dist, name, misbehaving(getattr(dist, name)))

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.freezing"
    sys.exit(main.main())
