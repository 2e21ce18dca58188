"""Where a thread stands: the collective that it is in, and the line of Megatron or of this project that called it."""

from __future__ import annotations

import ast
import json
import linecache
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType, TracebackType
from typing import Any, NamedTuple

COLLECTIVE_MODULES = (
    "torch.distributed.distributed_c10d",
    "torch.distributed._functional_collectives",
    "torch.distributed.nn.functional",
    "torch.distributed.rendezvous",
)

LIBRARIES = frozenset(sys.stdlib_module_names | {"torch", "numpy", "tqdm"})
"""Code that is not named as the place: whoever called it is."""


@dataclass(frozen=True)
class Place:
    """Attributes:
    line: ``file.py:12``, of the innermost code that is not a library's.
    collective: the function of torch.distributed that it has called and waits in, or the handle that it waits for.
    """

    line: str
    collective: str | None = None


class Spot(NamedTuple):
    """One frame of a stack, without the frame, which would keep its locals alive."""

    code: CodeType
    instruction: int
    line: int
    module: str


def thread_stack(thread_id: int) -> list[Spot]:
    """The stack of a thread, innermost first; empty if it has ended."""
    frame = sys._current_frames().get(thread_id)
    return list(_spots(frame))


def traceback_stack(traceback: TracebackType | None) -> list[Spot]:
    """The stack that has raised, innermost first."""
    spots = []
    while traceback is not None:
        spots.append(_spot(traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno))
        traceback = traceback.tb_next
    return spots[::-1]


def fingerprint(stack: Sequence[Spot]) -> int:
    """The same as long as a thread stands still, down to the instruction."""
    return hash(tuple((id(spot.code), spot.instruction) for spot in stack))


def place_of(stack: Sequence[Spot]) -> Place:
    """Where ``stack``, innermost first, has come to."""
    if not stack:
        return Place("an ended thread")
    depth = next((i for i, spot in enumerate(stack) if spot.module.partition(".")[0] not in LIBRARIES), 0)
    within = [spot.code.co_name for spot in stack[:depth] if spot.module in COLLECTIVE_MODULES]
    # Handles of collectives are C++ objects: their wait() has no frame, and is found in the text of its caller.
    collective = within[-1] if within else _wait_called_at(stack[0])
    return Place(f"{_shown_file(stack[depth])}:{stack[depth].line}", collective)


def oldest_in_flight(trace: bytes | str) -> str | None:
    """The collective that has been in flight for longest, of PyTorch's flight recorder (its JSON form)."""
    entries: list[dict[str, Any]] = json.loads(trace).get("entries", [])
    active = [entry for entry in entries if entry["state"] != "completed" and not entry["retired"]]
    if not active:
        return None
    return str(min(active, key=lambda entry: entry["record_id"])["profiling_name"])


def _spots(frame: FrameType | None) -> Iterator[Spot]:
    while frame is not None:
        yield _spot(frame, frame.f_lasti, frame.f_lineno)
        frame = frame.f_back


def _spot(frame: FrameType, instruction: int, line: int | None) -> Spot:
    return Spot(frame.f_code, instruction, line or 0, str(frame.f_globals.get("__name__", "")))


def _wait_called_at(spot: Spot) -> str | None:
    """``handle.wait()`` if that is the call that the frame is in, else None."""
    position = next(islice(spot.code.co_positions(), spot.instruction // 2, None), None)
    if position is None or None in position:
        return None
    first, last, start, end = (number or 0 for number in position)
    lines = [linecache.getline(spot.code.co_filename, number) for number in range(first, last + 1)]
    if first == last:
        text = lines[0].encode()[start:end].decode(errors="replace")  # columns count bytes
    else:
        text = "".join(lines).encode()[start:].decode(errors="replace").strip()
    try:
        call = ast.parse(text, mode="eval").body
    except SyntaxError:
        return None
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "wait":
        return f"{ast.unparse(call.func)}()"
    return None


def _shown_file(spot: Spot) -> str:
    """The path from the package on, or the whole of it for a script."""
    name, tail = spot.code.co_filename, spot.module.replace(".", "/")
    start = name.rfind(f"/{tail}.py") if f"/{tail}.py" in name else name.rfind(f"/{tail}/__init__.py")
    return name[start + 1 :] if start >= 0 else name
