"""The process beside each rank that writes checkpoints (``--async-save``) may die: all ranks are told, and none waits for it.

Megatron's ``PersistentAsyncCaller`` (core/dist_checkpointing/strategies/async_utils.py) never looks whether it lives. Killed,
by the kernel for want of memory say, it leaves its rank waiting for an answer, and every checkpoint after it unfinished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from megatron_ogpsa.cluster.words import described
from megatron_ogpsa.errors import TransientError
from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.integration.runtime.patching import Patch

_LOOK_SECONDS = 0.5

_DEAD = 2**16
"""Added to what a rank counts for in Megatron's sum over all ranks: more than all of them that are still writing."""


def _telling_of_the_dead(original: Callable[..., bool]) -> Callable[..., bool]:
    """The same all-reduce, in which a rank whose writer has died counts for more."""

    @wraps(original)
    def sync_all_async_calls(self: Any, is_alive: int) -> bool:
        own = int(is_alive) + (_DEAD if is_alive and _has_died(self.process) else 0)
        total = torch.tensor([own], dtype=torch.int, device=torch.cuda.current_device())
        dist.all_reduce(total)
        if total.item() < _DEAD:
            return total.item() == 0
        try:
            agreed(lambda: _require_alive(self.process))
        finally:
            self.close(abort=True)
        raise RuntimeError("a writer of checkpoints has died, and no rank says which")

    return sync_all_async_calls


def _require_alive(process: Any) -> None:
    if not _has_died(process):
        return
    from megatron.training import get_args

    memory = "" if process.exitcode != -9 else "; if nobody has killed it, its node is out of memory"
    raise TransientError(
        f"--async-save: the process that writes checkpoints beside the training has ended with "
        f"{described(process.exitcode)}{memory}: resume from the last checkpoint in --save {get_args().save}, or leave out "
        "--async-save, with which each node needs memory for a copy of what it saves"
    )


def _has_died(process: Any) -> bool:
    return process is not None and not process.is_alive()


def _waiting_for_the_living(original: Callable[..., bool]) -> Callable[..., bool]:
    """Where a rank waits for its own writer's answer it waits no longer than that lives."""

    @wraps(original)
    def is_current_async_call_done(self: Any, blocking: bool = False, no_dist: bool = False) -> bool:
        while blocking and self.process and self.cur_item is None:
            has_died = _has_died(self.process)  # before the last look for what it may have answered
            try:
                self.cur_item = self._persistent_comp_q.get(timeout=_LOOK_SECONDS)
            except Empty:
                blocking = not has_died
        return original(self, blocking, no_dist)

    return is_current_async_call_done


def _handed_to_the_living(original: Callable[..., Any]) -> Callable[..., Any]:
    """The rank waits until its writer has copied what is to be saved, or has died: that is told when all ranks meet."""

    @wraps(original)
    def _get_process(*args: Any, **kwargs: Any) -> Any:
        from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

        is_new = PersistentAsyncCaller._persistent_process is None
        process = original(*args, **kwargs)
        if is_new:
            copied: Any = PersistentAsyncCaller._persistent_preload_q
            copied.join = lambda: _join(copied, process)
        return process

    return _get_process


def _join(queue: Any, process: Any) -> None:
    """``JoinableQueue.join``, which has no timeout."""
    with queue._cond:
        while not queue._unfinished_tasks._semlock._is_zero() and not _has_died(process):
            queue._cond.wait(_LOOK_SECONDS)


def _leaving_the_dead(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def close(self: Any, abort: bool = False) -> None:
        has_died = _has_died(self.process)
        if has_died or (abort and self.process):
            for queue in (self._persistent_queue, self._persistent_preload_q):
                queue.cancel_join_thread()  # what nobody reads any more would keep this process from ending
        original(self, abort or has_died)

    return close


_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils:PersistentAsyncCaller"
_UNSEEN = (
    "it never looks whether the process that writes checkpoints lives, and waits for one that was killed without end"
)

WRITER_PATCHES = (
    Patch(target=f"{_CALLER}.sync_all_async_calls", reason=_UNSEEN, replace=_telling_of_the_dead),
    Patch(target=f"{_CALLER}.is_current_async_call_done", reason=_UNSEEN, replace=_waiting_for_the_living),
    Patch(
        target=f"{_CALLER}._get_process",
        reason=_UNSEEN,
        replace=lambda original: staticmethod(_handed_to_the_living(original)),
    ),
    Patch(target=f"{_CALLER}.close", reason=_UNSEEN, replace=_leaving_the_dead),
)
