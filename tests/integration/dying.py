"""``megatron-ogpsa`` of which rank 1 kills itself where ``DIE`` says: ``STAGE step N`` or ``STAGE policy ROUND``."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from megatron_ogpsa.cli import launching, main
from megatron_ogpsa.cli.train import STAGE_VARIABLE

_STAGE, _PHASE, _COUNT = (os.environ.get("DIE") or "- - 0").split()


def _die() -> None:
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("RANK") == "1" and os.environ.get(STAGE_VARIABLE) == _STAGE:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.integration.projection.run import ProjectionRun
    from megatron_ogpsa.reference_policy.passes import Passes

    before_step, run_passes, rounds = ProjectionRun.before_step, Passes.run, []

    def dying_before_step(self: Any, model: Any, optimizer: Any, forward_backward: Any, step: int) -> None:
        if _PHASE == "step" and step == int(_COUNT):
            _die()
        before_step(self, model, optimizer, forward_backward, step)

    def dying_passes(*args: Any) -> Any:
        rounds.append(None)
        if _PHASE == "policy" and len(rounds) > int(_COUNT):
            _die()
        return run_passes(*args)

    ProjectionRun.before_step = dying_before_step  # type: ignore[method-assign]
    Passes.run = dying_passes  # type: ignore[method-assign]

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.dying"
    sys.exit(main.main())
