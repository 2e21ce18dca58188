"""What a refresh prints of each reference."""

from __future__ import annotations

import math

from megatron_ogpsa.integration.protection import as_line, interval_figures
from megatron_ogpsa.plugin import ReferenceInterval

TOLD = {
    "math": ReferenceInterval(captured=0.83, predicted_change=0.001),
    "chat": ReferenceInterval(captured=0.5, predicted_change=None),
}


def test_the_first_refresh_tells_the_loss_alone() -> None:
    figures = interval_figures({"math": 1.5}, {}, {})
    assert as_line(0, figures) == "OGPSA refresh at step 0: math loss 1.5000"


def test_change_and_its_first_order_stand_side_by_side() -> None:
    figures = interval_figures({"math": 1.5, "chat": 2.0, "new": 3.0}, {"math": 1.48, "chat": 2.5}, TOLD)
    assert math.isclose(figures["math"]["change"], 0.02)
    assert as_line(30, figures) == (
        "OGPSA refresh at step 30: math loss 1.5000 (+0.0200, to first order +0.0010), 83% of its gradient was protected; "
        "chat loss 2.0000 (-0.5000), 50% of its gradient was protected; new loss 3.0000"
    )
