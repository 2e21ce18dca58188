"""Whether all ranks can talk to each other over every axis: what their probes tell, judged with a timeout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from megatron_ogpsa.doctor.findings import Finding, fail, ok, warn
from megatron_ogpsa.doctor.steps import GROUPS, START, Layout

START_SECONDS = 300.0
"""What ranks get at least for what imports torch and Megatron, which a slow file system can make last."""

SECONDS_PER_RANK = 0.1
"""What each step gets more for each rank that takes part: NCCL connects a group when it is first used, which is here."""

_POLL_SECONDS = 0.05


class Reports(Protocol):
    """The part of torch's store that is used here."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Their values."""


def watch(
    reports: Reports,
    layout: Layout,
    *,
    timeout: float,
    look_after_processes: Callable[[], None] = lambda: None,
    start_seconds: float = START_SECONDS,
) -> Iterator[Finding]:
    """A finding for each step of the probes, as soon as all ranks have told; after a failure the rest is not tried.

    Args:
        reports: what the probes tell, see :mod:`megatron_ogpsa.doctor.probe`.
        timeout: seconds for an all-reduce; see :func:`limit`.
        look_after_processes: called now and then; notes ended processes in the store as failed.
        start_seconds: for steps that import libraries.
    """
    broken: str | None = None
    hosts: dict[int, str] = {}
    for step in layout.steps:
        name = step if step in (START, GROUPS) else f"all-reduce {step}"
        if broken is not None:
            yield warn(name, f"not tried after the failure of: {broken}", f"mend first: {broken}")
            continue
        seconds = limit(step, layout, timeout, start_seconds)
        missing = _wait(reports, step, layout.world, seconds, look_after_processes)
        finding = _judged(reports, step, name, layout, hosts, missing, seconds)
        broken = name if finding.level == "FAIL" else None
        yield finding


def limit(step: str, layout: Layout, timeout: float, start_seconds: float = START_SECONDS) -> float:
    """Seconds that a step may take."""
    own = max(start_seconds, timeout) if step in (START, GROUPS) else timeout
    return own + SECONDS_PER_RANK * layout.axes.get(step, layout.world)


def _wait(
    reports: Reports, step: str, world: int, seconds: float, look_after_processes: Callable[[], None]
) -> list[int]:
    """Ranks that have not ended the step when all have, one has failed, or the time is over."""
    keys = [f"{step}/ended/{rank}" for rank in range(world)]
    deadline = time.monotonic() + seconds
    while not reports.check(keys):
        look_after_processes()
        if time.monotonic() > deadline or any(reports.check([f"failed/{rank}"]) for rank in range(world)):
            return [rank for rank in range(world) if not reports.check([f"{step}/ended/{rank}"])]
        time.sleep(_POLL_SECONDS)
    return []


def _judged(
    reports: Reports,
    step: str,
    name: str,
    layout: Layout,
    hosts: dict[int, str],
    missing: Sequence[int],
    seconds: float,
) -> Finding:
    if missing:
        return fail(name, _who_is_missing(reports, step, hosts, missing, seconds), _remedy(step))
    told = {
        rank: value.decode()
        for rank, value in enumerate(reports.multi_get([f"{step}/ended/{rank}" for rank in range(layout.world)]))
    }
    if step == START:
        hosts |= told
        return ok(name, f"{_ranks(told)} on {', '.join(dict.fromkeys(told.values()))}")
    if wrong := {rank: text for rank, text in told.items() if text != "ok"}:
        rank, text = next(iter(wrong.items()))
        return fail(name, f"{_named([rank], hosts)}: {text}", "see whether other jobs use the same ports, or report it")
    if step == GROUPS:
        return ok(name, "Megatron's process groups are built")
    size = layout.axes.get(step, layout.world)
    return ok(name, f"{layout.world // size} group{'s' * (layout.world > size)} of {size}, the sum is right")


def _who_is_missing(reports: Reports, step: str, hosts: dict[int, str], missing: Sequence[int], seconds: float) -> str:
    """The ranks whose fault it may be: those that have failed, or else have not begun, or else have not ended."""
    failed = [rank for rank in missing if reports.check([f"failed/{rank}"])]
    if failed:
        message = reports.multi_get([f"failed/{failed[0]}"])[0].decode()
        return f"{_named(failed, hosts)} failed: {message}"
    silent = [rank for rank in missing if not reports.check([f"{step}/begun/{rank}"])]
    if not silent:
        return f"{_named(missing, hosts)} began it and did not end within {seconds:.0f} s"
    waiting = [rank for rank in missing if rank not in silent]
    others = f"; {_named(waiting, {})} wait{'s' * (len(waiting) == 1)}" if waiting else ""
    return f"{_named(silent, hosts)} did not answer within {seconds:.0f} s{others}"


def _remedy(step: str) -> str:
    if step == START:
        return (
            "see whether all nodes reach MASTER_ADDR:MASTER_PORT, and whether GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
            "name the interface that joins them"
        )
    return (
        "see whether that process is stopped or its host overloaded; between nodes, whether GLOO_SOCKET_IFNAME or "
        "NCCL_SOCKET_IFNAME name the interface that joins them (NCCL_DEBUG=INFO tells more)"
    )


def _named(ranks: Sequence[int], hosts: dict[int, str]) -> str:
    """``rank 1`` or ``ranks 1, 3``, with the host where there are several."""
    names = [
        f"{rank} on {hosts[rank]}" if len(set(hosts.values())) > 1 and rank in hosts else str(rank) for rank in ranks
    ]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"rank{'s' * (len(ranks) != 1)} {shown}"


def _ranks(ranks: Iterable[int]) -> str:
    number = len(list(ranks))
    return f"{number} rank{'s' * (number != 1)}"
