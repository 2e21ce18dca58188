"""``megatron-ogpsa`` in which one rank meets what is not finite, as ``PLANT`` says: ``WHAT RANK STEP``.

``gradient`` poisons the accumulated gradient of that training step, ``reference`` that of every refresh from that step on,
``basis`` an element of the basis before that step; ``refusal`` is a model that the plugin does not take, whatever the step.
Variables reach the ranks; arguments would have to be flags.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from megatron_ogpsa.cli import launching, main

if "RANK" in os.environ:
    from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

    install_if_no_gpu()
    from megatron_ogpsa.errors import UnsupportedError
    from megatron_ogpsa.integration.projection import run
    from megatron_ogpsa.plugin import ogpsa, support
    from megatron_ogpsa.references import gradients

    what, rank, first = os.environ["PLANT"].split()
    is_mine = os.environ["RANK"] == rank
    before_step, capture = run.ProjectionRun.before_step, gradients.OGPSA.capture
    now = {"step": 0}

    def planted_before_step(self: Any, model: list[Any], optimizer: Any, forward_backward: Any, step: int) -> None:
        now["step"] = step + 1
        before_step(self, model, optimizer, forward_backward, step)
        if is_mine and now["step"] == int(first):
            if what == "basis":
                self._ogpsa._space.basis.rows_KN[0, 0] = float("inf")
            if what == "gradient":
                next(model[0].parameters()).register_hook(lambda gradient: gradient * float("nan"))

    def planted_capture(self: Any, name: str, *, loss_scale: float | None = None) -> None:
        capture(self, name)
        if what == "reference" and is_mine and now["step"] >= int(first):
            self._captured_KN[-1, 0] = float("nan")

    def planted_refusal(*args: Any) -> None:
        raise UnsupportedError("--a-layer: it is of another kind; leave it out")

    if what == "refusal" and is_mine:
        support.check_supported = ogpsa.check_supported = planted_refusal  # type: ignore[assignment]
    run.ProjectionRun.before_step = planted_before_step  # type: ignore[method-assign]
    gradients.OGPSA.capture = planted_capture  # type: ignore[method-assign]

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.planting"
    sys.exit(main.main())
