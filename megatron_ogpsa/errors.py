"""Errors that are the user's to mend, told in one line."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in flags, configuration or data that the user can mend.

    The message is one line: what is wrong, where (``file:line`` or the flag's name), and the remedy. The command line
    prints it without a traceback and exits with :attr:`exit_code`. In a distributed run it is raised on every rank alike
    (see :mod:`megatron_ogpsa.integration.agreement`), so that no rank waits for another one.
    """

    exit_code: int = 2


class UnsupportedError(UserError):
    """A Megatron feature that projection does not support yet: the flag, the reason, the nearest thing that works."""
