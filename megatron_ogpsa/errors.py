"""Errors that are the user's to mend, told in one line."""

from __future__ import annotations

import traceback

_MOST_CHARACTERS = 2000


class UserError(Exception):
    """A mistake in flags, configuration or data that the user can mend.

    The message is one line: what is wrong, where (``file:line`` or the flag's name), and the remedy. The command line
    prints it without a traceback and exits with :attr:`exit_code`. In a distributed run it is raised on every rank alike
    (see :mod:`megatron_ogpsa.integration.ranks.agreement`), so that no rank waits for another one.
    """

    exit_code: int = 2

    is_alike: bool = True
    """Whether every rank has it; one that does not is told already (:mod:`megatron_ogpsa.integration.ranks.agreement`)."""

    def __init__(self, message: str) -> None:
        """``message`` may quote names and data that nobody has checked; see :func:`shown`."""
        super().__init__(shown(message))


class TransientError(UserError):
    """What may be over at the next start, a file system that is away for a while say: the one user error worth a restart."""

    exit_code: int = 1


class UnsupportedError(UserError):
    """A Megatron feature that projection does not support yet: the flag, the reason, the nearest thing that works."""


def one_line(error: BaseException) -> str:
    """The message of ``error`` and where it was raised; the condition that failed where Megatron asserts without words."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    message = " ".join(str(error).split()) or line or type(error).__name__
    return f"{message} ({where(error)})"


def where(error: BaseException) -> str:
    """``file:line`` at which ``error`` was raised; a library's file as seen from where libraries are installed."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"


def shown(text: str) -> str:
    """Text that a terminal shows as one line whatever was quoted in it: no line ends, no control characters, no novel.

    White space becomes spaces, and other characters that cannot be printed are spelt as Python does. Of a long text the
    start (the place) and the end (the remedy) are kept.
    """
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[: _MOST_CHARACTERS // 2]} ... {text[-_MOST_CHARACTERS // 2 :]}"
    return "".join(" " if c.isspace() else c if c.isprintable() else ascii(c)[1:-1] for c in text)
