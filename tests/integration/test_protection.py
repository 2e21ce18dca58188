"""What a refresh prints of each reference."""

from __future__ import annotations

import math

from megatron_ogpsa.integration.projection.protection import as_line, interval_figures
from megatron_ogpsa.plugin.interval import ReferenceInterval
from megatron_ogpsa.references.gradients import MeanLoss

TOLD = {
    "math": ReferenceInterval(captured=0.83, predicted_change=0.001),
    "chat": ReferenceInterval(captured=0.5, predicted_change=None),
}


def losses(**values: float) -> dict[str, dict[str, MeanLoss]]:
    """References of one part."""
    return {name: {name: MeanLoss(value, 10.0)} for name, value in values.items()}


def test_the_first_refresh_tells_the_loss_alone() -> None:
    figures = interval_figures(losses(math=1.5), {}, {})
    assert as_line(0, figures) == "OGPSA refresh at step 0: math loss 1.5000"


def test_change_and_its_first_order_stand_side_by_side() -> None:
    figures = interval_figures(losses(math=1.5, chat=2.0, new=3.0), losses(math=1.48, chat=2.5), TOLD)
    assert math.isclose(figures["math"]["change"], 0.02)
    assert as_line(30, figures) == (
        "OGPSA refresh at step 30: math loss 1.5000 (+0.0200, to first order +0.0010), 83% of its gradient was protected; "
        "chat loss 2.0000 (-0.5000), 50% of its gradient was protected; new loss 3.0000"
    )


def test_parts_of_a_reference_weigh_by_their_tokens() -> None:
    parts = {"math (1/2)": MeanLoss(1.0, 30.0), "math (2/2)": MeanLoss(3.0, 10.0)}
    told = {
        "math (1/2)": ReferenceInterval(captured=0.8, predicted_change=0.1),
        "math (2/2)": ReferenceInterval(captured=0.4, predicted_change=-0.1),
    }
    (own,) = interval_figures({"math": parts}, {}, told).values()
    assert math.isclose(own["loss"], 1.5)
    assert math.isclose(own["captured"], 0.6)
    assert math.isclose(own["predicted"], 0.05)
