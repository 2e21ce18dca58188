"""A function of the user's that judges answers: ``judge(prompt: str, answer: str) -> bool | float``.

One that has a parameter ``messages`` gets the conversation too, of which ``prompt`` is the last message alone.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_ogpsa.console.progress import with_progress
from megatron_ogpsa.errors import UserError, one_line

if TYPE_CHECKING:
    from megatron_ogpsa.data.prompts import Prompt

Judge = Callable[..., Any]


def check_judge(name: str) -> None:
    """Look whether there is such a file, without importing anything: a judge may load a model.

    Raises:
        UserError: the name is of another form, or its file is not there.
    """
    place, _ = _parts(name)
    if place.endswith(".py"):
        _require_file(place, f"--judge {name}")


def load_judge(name: str) -> Judge:
    """Import the function; its module is executed, so that it must be the user's own.

    Args:
        name: ``path/of/file.py:function`` or ``package.module:function``.

    Raises:
        UserError: there is no such file, module or function, it cannot be called, or its module raises when it is imported.
    """
    flag = f"--judge {name}"
    place, function = _parts(name)
    try:
        module = _module_of_file(place, flag) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise UserError(f"{flag}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    judge = getattr(module, function, None)
    if not callable(judge):
        what = "is not a function" if judge is not None else "is not there"
        raise UserError(f"{flag}: {function} {what}: name one that takes (prompt, answer)")
    found: Judge = judge
    return found


def _parts(name: str) -> tuple[str, str]:
    place, colon, function = name.rpartition(":")
    if not colon or not place or not function:
        raise UserError(f"--judge {name}: write FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    return place, function


def _require_file(place: str, flag: str) -> Path:
    path = Path(place)
    if not path.is_file():
        raise UserError(f"{flag}: no such file: check the path (it is relative to {Path.cwd()})")
    return path


def _module_of_file(place: str, flag: str) -> ModuleType:
    path = _require_file(place, flag)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def verdicts_of(judge: Judge, name: str, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[float]:
    """What ``judge`` says of one answer after the other, 0 to 1; a progress line if it takes more than a moment.

    Args:
        name: of the judge, for messages.

    Raises:
        UserError: it raises, or returns what is neither a truth value nor a number from 0 to 1; with the answer's number.
    """
    takes_messages = _takes_messages(judge)
    pairs = with_progress(zip(prompts, answers, strict=True), "judging", len(prompts), " answers")
    for number, (prompt, answer) in enumerate(pairs, start=1):
        place = f"--judge {name}: answer {number} of {len(prompts)}"
        try:
            # A copy: what the judge does to it must not reach the file of answers.
            more = {"messages": copy.deepcopy(prompt.messages)} if takes_messages else {}
            verdict = judge(prompt.text, answer, **more)
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            raise UserError(f"{place}: it raised {type(error).__name__}: {one_line(error)}") from error
        value = _number(verdict)
        if not 0 <= value <= 1:
            raise UserError(f"{place}: it returned {verdict!r}: return True or False, or a number from 0 to 1")
        yield value


def _number(verdict: Any) -> float:
    """NaN for what is none, such as the None of a judge that forgets to return."""
    try:
        return float(verdict)
    except Exception:  # of any class of the user's
        return math.nan


def _takes_messages(judge: Judge) -> bool:
    try:
        return "messages" in inspect.signature(judge).parameters
    except ValueError:  # of some functions that are written in C there is none
        return False
