"""Plots of a demo run, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_ogpsa.demo.results import Curve, Results

# Okabe and Ito's colours, which stay apart for colour-blind readers: black, orange, blue, green, purple.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v")
_DPI = 130
LOSS, REMOVED = "lm loss", "ogpsa removed"


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write ``tasks.png``, ``tradeoff.png`` and, where there are curves, ``training.png``; returns their paths."""
    figures = {"tasks": task_figure(results), "tradeoff": tradeoff_figure(results)}
    if results.curves:
        figures["training"] = training_figure(results)
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def task_figure(results: Results) -> Figure:
    """Accuracy per general task, one bar for each variant."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    tasks = [*next(iter(results.scores.values())).accuracy]
    width = 0.84 / len(results.scores)
    for index, (variant, scores) in enumerate(results.scores.items()):
        offset = (index - (len(results.scores) - 1) / 2) * width
        heights = [*scores.accuracy.values(), scores.general_accuracy]
        places = [place + offset for place in range(len(heights))]
        axes.bar(
            places,
            [100 * height for height in heights],
            width * 0.94,
            color=_COLOURS[index],
            label=results.titles[variant],
        )
    axes.axvline(len(tasks) - 0.5, color="0.8", linewidth=1)
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axes.set_ylim(0, 105)
    axes.set_ylabel("exact answers (%)")
    axes.set_title("General abilities before and after safety fine-tuning")
    _finish(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(results.scores), frameon=False)
    return figure


def tradeoff_figure(results: Results) -> Figure:
    """Refusal on unsafe requests against general accuracy; a hollow mark at the same height shows refusal on benign ones."""
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, (variant, scores) in enumerate(results.scores.items()):
        look: dict[str, Any] = {"marker": _MARKERS[index], "color": _COLOURS[index], "s": 90, "zorder": 3}
        height = 100 * scores.general_accuracy
        axes.scatter(100 * scores.unsafe_refused, height, label=results.titles[variant], **look)
        axes.scatter(100 * scores.benign_refused, height, facecolors="none", linewidths=1.4, **{**look, "zorder": 2})
    axes.set_xlim(-5, 105)
    axes.margins(y=0.12)
    axes.set_xlabel("requests refused (%): filled, unsafe; hollow, benign")
    axes.set_ylabel("general accuracy (%)")
    axes.set_title("Safety and what it costs: the upper right corner is best")
    _finish(axes)
    axes.legend(loc="center", frameon=False)
    return figure


def training_figure(results: Results) -> Figure:
    """The safety loss over steps and, where the log has it, the share of the gradient that was removed."""
    panels = [(LOSS, "safety loss (nats per token)")]
    if any(REMOVED in curves for curves in results.curves.values()):
        panels.append((REMOVED, "share of ‖g‖² removed"))
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, variant in enumerate(results.scores):
            curve = results.curves.get(variant, {}).get(name, Curve())
            if curve.steps:
                axes.plot(
                    curve.steps, curve.values, color=_COLOURS[index], linewidth=1.5, label=results.titles[variant]
                )
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _finish(axes)
        axes.legend(frameon=False)
    return figure


def _finish(axes: Any) -> None:
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
