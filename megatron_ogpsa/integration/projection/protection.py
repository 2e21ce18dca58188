"""Whether protection works in the run at hand: each reference's loss from one refresh to the next, told and logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_ogpsa.plugin.interval import ReferenceInterval
    from megatron_ogpsa.references.gradients import MeanLoss

Losses = Mapping[str, Mapping[str, "MeanLoss"]]
"""Reference → part → loss. A reference's own loss is the mean over all that its parts are means over."""


def mean_loss(parts: Mapping[str, MeanLoss]) -> float:
    """Of a reference."""
    return sum(part.value * part.number for part in parts.values()) / sum(part.number for part in parts.values())


def interval_figures(
    losses: Losses, before: Losses, interval: Mapping[str, ReferenceInterval]
) -> dict[str, dict[str, float]]:
    """For each reference what is known of the steps since the last refresh.

    ``loss``: mean over its samples now. ``change``: of that loss. ``predicted``: ⟨a, Δθ⟩ with the gradient a of the last
    refresh, which is what the steps have done to first order; the rest of ``change`` is curvature, and what sixteen-bit
    weights and dropout add. ``captured``: share of the fresh gradient's energy in the subspace that was protected, the
    mean over parts where a reference gives several gradients.
    """
    figures: dict[str, dict[str, float]] = {}
    for name, parts in losses.items():
        own = {"loss": mean_loss(parts)}
        if name in before:
            own["change"] = own["loss"] - mean_loss(before[name])
        told = [interval[part] for part in parts if part in interval]
        if len(told) == len(parts):
            own["captured"] = sum(part.captured for part in told) / len(told)
            number = sum(part.number for part in parts.values())
            # The reference's gradient is the mean of its parts', weighted as its loss is.
            changes = [part.predicted_change for part in told]
            if None not in changes:
                weights = [part.number / number for part in parts.values()]
                own["predicted"] = sum(w * float(c or 0.0) for w, c in zip(weights, changes, strict=True))
        figures[name] = own
    return figures


def as_line(step: int, figures: Mapping[str, Mapping[str, float]]) -> str:
    """One line for the console."""
    parts = []
    for name, own in figures.items():
        told = f"{name} loss {own['loss']:.4f}"
        if "change" in own:
            told += f" ({own['change']:+.4f}"
            told += f", to first order {own['predicted']:+.4f})" if "predicted" in own else ")"
        if "captured" in own:
            told += f", {own['captured']:.0%} of its gradient was protected"
        parts.append(told)
    return f"OGPSA refresh at step {step}: {'; '.join(parts)}"


def tell_interval(step: int, losses: Losses, before: Losses, interval: Mapping[str, ReferenceInterval]) -> None:
    """Print and log the figures, on the rank that logs; others do nothing."""
    from megatron.training import get_tensorboard_writer, get_wandb_writer, print_rank_last

    figures = interval_figures(losses, before, interval)
    if figures:
        print_rank_last(as_line(step, figures))
        log_figures(step, figures, get_tensorboard_writer(), get_wandb_writer())


def log_figures(step: int, figures: Mapping[str, Mapping[str, float]], tensorboard: Any, wandb: Any) -> None:
    """TensorBoard and Weights & Biases, where there are, get ``ogpsa NAME/loss``, ``…/change``, ``…/predicted`` and
    ``…/captured``.
    """
    named = {f"ogpsa {name}/{key}": value for name, own in figures.items() for key, value in own.items()}
    if tensorboard:
        for name, value in named.items():
            tensorboard.add_scalar(name, value, step)
    if wandb:
        wandb.log(named, step)
