"""What a checkpoint says of the model that it was saved with, beside the flags of the model that it is loaded into.

Megatron compares layers, hidden size and heads, and where a run begins from weights nothing. With another base of the rotary
positions, or another epsilon, all tensors fit, and the model computes something else.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from megatron_ogpsa.attributes import attributes_set
from megatron_ogpsa.errors import shown
from megatron_ogpsa.integration.arguments.model import MODEL_ARGUMENTS, UNCONVERTED_ARGUMENTS

_COMPARED = tuple(name for name in (*MODEL_ARGUMENTS, *UNCONVERTED_ARGUMENTS) if name != "num_query_groups")
"""Of a model without query groups Megatron makes their number that of the heads in its first step, and not before; and with
another number of groups tensors do not fit."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A flag that has another value than in the run that has saved the checkpoint.

    Attributes:
        given, saved: its value here, and there; None where it was left out.
    """

    flag: str
    given: Any
    saved: Any

    def told(self, place: str) -> str:
        """One line, for whoever loads the checkpoint at ``place``: another value may be meant, so that it is no error."""
        saved, is_off = self._with(self.saved), self.saved is None or self.saved is False
        remedy = f"leave {self.flag} out" if is_off else f"give {saved}"
        return shown(
            f"WARNING: {place} was saved with {saved} and is loaded with {self._with(self.given)}: {remedy}, unless another "
            "value than the checkpoint's is meant, as for longer contexts"
        )

    def as_json(self) -> dict[str, Any]:
        """Flag and values."""
        return {"flag": self.flag, "given": _plain(self.given), "checkpoint": _plain(self.saved)}

    def _with(self, value: Any) -> str:
        """As on a command line."""
        if value is None or isinstance(value, bool):
            return self.flag if value else f"no {self.flag}"
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return f"{self.flag} {shlex.quote(text)}"


@dataclass
class SavedArguments:
    """Those of the checkpoint that was loaded last.

    Attributes:
        place: its folder.
        values: Megatron's arguments; None if it has none, or if nothing was loaded.
    """

    place: str = ""
    values: Any = None

    def differences(self, args: argparse.Namespace) -> tuple[Difference, ...]:
        """What of the model is another in ``args``; of arguments that the checkpoint does not have nothing is known."""
        pairs = {
            name: (getattr(args, name), getattr(self.values, name))
            for name in _COMPARED
            if hasattr(self.values, name) and hasattr(args, name)
        }
        other = {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}
        flags = _flags() if other else {}  # of eight hundred
        return tuple(Difference(flag=flags[name], given=given, saved=saved) for name, (given, saved) in other.items())


@contextmanager
def noted_arguments() -> Iterator[SavedArguments]:
    """Note the arguments of what Megatron loads within the with statement."""
    from megatron.training import checkpointing

    noted, original = SavedArguments(), checkpointing._load_base_checkpoint

    @wraps(original)
    def load_and_note(*args: Any, **kwargs: Any) -> Any:
        state, place, *rest = original(*args, **kwargs)
        if state and state.get("args") is not None:
            noted.place, noted.values = str(place), state["args"]
        return state, place, *rest

    with attributes_set([(checkpointing, "_load_base_checkpoint", load_and_note)]):
        yield noted


@contextmanager
def told_differences(args: argparse.Namespace) -> Iterator[None]:
    """Say what differs from ``args`` in what Megatron loads; also where that fails, of which it may be the cause."""
    from megatron.training import print_rank_0

    with noted_arguments() as noted:
        try:
            yield
        finally:
            for difference in noted.differences(args):
                print_rank_0(difference.told(noted.place))


def _flags() -> dict[str, str]:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    return {action.dest: action.option_strings[0] for action in build_parser()._actions if action.option_strings}


def _plain(value: Any) -> Any:
    """To be compared, and written as JSON: a checkpoint may hold anything."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
