"""``megatron-ogpsa`` of which all ranks and the command are killed at once where ``KILL`` says: ``PHASE COUNT SECONDS``.

The kill comes so many seconds after the phase has begun for the COUNT-th time on rank 0, from a thread: anywhere within it,
or later. Phases: ``refresh``, ``step``, ``save``, ``policy`` (a round of reference log-probabilities).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

from megatron_ogpsa.cli import launching, main


def _arm(seconds: float) -> None:
    def kill() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)  # the command leads the group that its ranks are in

    threading.Timer(seconds, kill).start()


def _watch(owner: Any, name: str, phase: str, *, at_end: bool = False) -> None:
    """Arm the kill when ``owner.name`` is called, or has returned, as often as asked."""
    wanted, count, seconds = os.environ["KILL"].split()
    original, calls = getattr(owner, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        def meet() -> None:
            calls.append(None)
            if phase == wanted and len(calls) == int(count):
                _arm(float(seconds))

        if not at_end:
            meet()
        result = original(*args, **kwargs)
        if at_end:
            meet()
        return result

    setattr(owner, name, watched)


if os.environ.get("RANK") == "0" and os.environ.get("KILL"):
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.loop import hooks
    from megatron_ogpsa.integration.projection.run import ProjectionRun
    from megatron_ogpsa.reference_policy.passes import Passes
    from megatron_ogpsa.references import gradients

    _watch(gradients, "refresh", "refresh")
    _watch(ProjectionRun, "before_step", "step", at_end=True)
    _watch(hooks, "announce_state", "save")
    _watch(Passes, "run", "policy")

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.survival.dying"
    sys.exit(main.main())
