"""Start the ranks on this machine with torchrun's own agent, and say what went wrong in one line."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping

from megatron_ogpsa.cli.failures import first_failure, last_word
from megatron_ogpsa.cli.main import ERRORS_VARIABLE
from megatron_ogpsa.cli.thawing import stopped_processes_end
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.watchdog import HANG_EXIT_CODE

RANK_MODULE = "megatron_ogpsa.cli.main"
"""What each rank runs."""


def launch(arguments: list[str], *, num_ranks: int, environment: Mapping[str, str] | None = None) -> int:
    """Run ``megatron-ogpsa ARGUMENTS`` in ``num_ranks`` processes and wait for them.

    Args:
        environment: variables of the ranks beside this process's own.

    Returns:
        0, or the exit code of the first rank that failed; if one fails the others are ended. A user error is told by the
        ranks themselves; the agent's own report of failed children would bury it and is kept for other failures.

    Raises:
        UserError: not a possible number of ranks.
    """
    if num_ranks < 1:
        raise UserError(f"--nproc-per-node {num_ranks}: use 1 or more")
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # As torchrun does for more than one rank, but sharing out the cores rather than leaving most of them idle.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    with tempfile.TemporaryDirectory() as errors, stopped_processes_end():
        os.environ.update({**(environment or {}), ERRORS_VARIABLE: errors})  # torchrun's agent hands them on
        return _run(lambda: elastic_launch(config, sys.executable)("-u", "-m", RANK_MODULE, *arguments))


def _run(start: Callable[[], object]) -> int:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        start()
    except ChildFailedError as error:
        exit_codes = [failure.exitcode for failure in error.failures.values()]
        if UserError.exit_code in exit_codes:
            return UserError.exit_code
        rank, first = first_failure(error.failures)
        if first.exitcode == HANG_EXIT_CODE or (first.exitcode < 0 and HANG_EXIT_CODE in exit_codes):
            return HANG_EXIT_CODE
        print(f"megatron-ogpsa: {last_word(rank, first)}", file=sys.stderr)
        return first.exitcode if first.exitcode > 0 else 1
    return 0
