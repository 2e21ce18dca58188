"""Start the ranks of this node, each as a process that is this command again."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping

from megatron_ogpsa.cluster.settings import LaunchSettings
from megatron_ogpsa.console.telling import ERRORS_VARIABLE
from megatron_ogpsa.system.processes import PARENT_VARIABLE

RANK_MODULE = "megatron_ogpsa.cli.main"
"""What each rank runs."""


def launch(
    arguments: list[str],
    *,
    settings: LaunchSettings,
    environment: Mapping[str, str] | None = None,
    on_signal: Callable[[signal.Signals], None] = lambda _: None,
) -> int:
    """Run ``megatron-ogpsa ARGUMENTS`` as the ranks of this node and wait for them.

    Args:
        environment: variables of the ranks beside this process's own.
        on_signal: called with each signal that is forwarded to the ranks; they may still exit with 0.

    Returns:
        0, or the exit code of the first rank that failed; if one fails the others are ended. A user error is told by the
        ranks themselves, once on each node.

    Raises:
        UserError: there is no GPU to start a rank for.
    """
    from megatron_ogpsa.cluster.node import run_node

    with tempfile.TemporaryDirectory() as errors:
        own = {ERRORS_VARIABLE: errors, PARENT_VARIABLE: str(os.getpid())}
        os.environ.update({**(environment or {}), **own})  # the agent hands them on
        return run_node([sys.executable, "-u", "-m", RANK_MODULE, *arguments], settings, on_signal)
