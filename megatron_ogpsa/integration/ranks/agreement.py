"""Failures that all ranks see alike, so that no rank waits in a collective for one that has raised."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch.distributed as dist

from megatron_ogpsa.console.telling import tell_once
from megatron_ogpsa.errors import TransientError, UserError

_USER, _TRANSIENT, _INTERNAL = "user", "transient", "internal"


def agreed[T](action: Callable[[], T], *, group: dist.ProcessGroup | None = None) -> T:
    """Run ``action`` on every rank of ``group`` and fail on all of them if it fails on any.

    Every rank of the group must make the call; it costs one ``all_gather_object`` of a short message. ``action`` itself
    must not communicate: a rank that fails in it would be missed by the others. Before torch.distributed is
    initialised the action simply runs.

    Raises:
        UserError: some rank raised one; the message of the lowest such rank, which is named unless all failed alike.
        TransientError: that was all that ranks raised.
        RuntimeError: some rank raised anything else; names the rank, whose traceback stands in its own stderr.
    """
    if not dist.is_initialized():
        return action()
    failure: tuple[str, str] | None = None
    result: list[T] = []
    try:
        result.append(action())
    except UserError as error:
        failure = (_TRANSIENT if isinstance(error, TransientError) else _USER, str(error))
    except Exception as error:  # any failure here would leave the other ranks waiting
        traceback.print_exc(file=sys.stderr)
        failure = (_INTERNAL, f"{type(error).__name__}: {error}")
    _raise_alike(failure, group)
    return result[0]


def from_rank_0[T](action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, on all ranks: who looks alone sees one state of a file system. Collective.

    Raises:
        UserError, TransientError, RuntimeError: as :func:`agreed`.
    """
    is_first = dist.get_rank() == 0
    box = [agreed(lambda: action() if is_first else None)]
    dist.broadcast_object_list(box, src=0)
    result: T = box[0]  # type: ignore[assignment]
    return result


def of_this_rank[E: UserError](error: E) -> E:
    """Tell ``error`` now, which the other ranks do not have: where they wait for this one it may not come to its end."""
    tell_once(str(error))
    error.is_alike = False
    return error


def _raise_alike(failure: tuple[str, str] | None, group: dist.ProcessGroup | None) -> None:
    failures: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(failures, failure, group=group)
    failed = [(rank, item) for rank, item in enumerate(failures) if item is not None]
    if not failed:
        return
    for rank, (kind, message) in failed:
        if kind == _INTERNAL:  # a defect outranks a user's mistake: it must not hide behind one line
            raise RuntimeError(f"rank {_global_rank(rank, group)} failed: {message}")
    lasting = [item for item in failed if item[1][0] == _USER]  # a restart would end at these again
    rank, (kind, message) = (lasting or failed)[0]
    everywhere = len(failed) == len(failures) and len({item for _, item in failed}) == 1
    told = message if everywhere else f"{message} (on rank {_global_rank(rank, group)})"
    raise (UserError if kind == _USER else TransientError)(told)


def _global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)
