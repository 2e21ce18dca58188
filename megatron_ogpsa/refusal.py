"""What is refused at start: tables of what is asked for, why that cannot be, and what works; one function asks them.

A table stands where the knowledge is (``plugin/limits.py``, ``integration/arguments/cpu.py``, ...). Nothing here knows of
argparse, torch or Megatron: what is asked for is any object whose fields are called as Megatron calls its flags, which its
arguments and its configurations of models, optimizers and data parallelism all are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_ogpsa.errors import UnsupportedError

NOT_SUPPORTED = " is not supported"
"""What stands between a flag and the reason where nothing else is to blame."""


@dataclass(frozen=True)
class Refusal:
    """One thing that is refused.

    The line is ``FLAG SCOPE: REASON; REMEDY``, or ``FLAG SCOPE: REMEDY``; ``megatron-ogpsa doctor`` cuts it at the semicolon.

    Attributes:
        flag: as the user calls it. Values stand in it as fields of what is asked, ``--optimizer {0.optimizer}``.
        reason: why, likewise; empty where flag and scope have said it.
        remedy: what to change; the nearest thing that works.
        applies: whether it is asked for; by default, whether the field that the flag sets is true.
    """

    flag: str
    reason: str
    remedy: str = "leave it out"
    applies: Callable[[Any], object] | None = None

    def is_asked(self, asked: Any) -> bool:
        """Whether ``asked`` wants it. A field that is missing raises: a misspelt one must not pass for one left out."""
        if self.applies is not None:
            return bool(self.applies(asked))
        return bool(getattr(asked, self.flag.removeprefix("--").replace("-", "_")))

    def line(self, asked: Any, scope: str) -> str:
        """What the user reads."""
        why = f"{self.reason.format(asked)}; {self.remedy}" if self.reason else self.remedy
        return f"{self.flag.format(asked)}{scope}: {why}"


def refuse(table: Iterable[Refusal], asked: Any, scope: str = NOT_SUPPORTED) -> None:
    """Raise the first refusal of ``table`` that ``asked`` meets. Local, no communication.

    Args:
        asked: parsed arguments, or a configuration of Megatron's.
        scope: follows the flag: what it does not go with, such as ``" with --ogpsa-reference is not supported"``.

    Raises:
        UnsupportedError: naming the flag, the reason and the remedy.
    """
    for refusal in table:
        if refusal.is_asked(asked):
            raise UnsupportedError(refusal.line(asked, scope))
