"""Plots of a demo run, drawn without a display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from megatron_ogpsa.console.training_log import Curve
from megatron_ogpsa.demo.results import Results
from megatron_ogpsa.demo.scoring import Scores

# Okabe and Ito's colours, which stay apart for colour-blind readers, by what is trained; black is the starting model.
_COLOURS = {None: "#000000", "sft": "#E69F00", "dpo": "#0072B2", "sft-dpo": "#009E73"}
_SHADES = {None: 1.0, "paper": 0.45, "ogpsa": 1.0, "model": 0.7}
"""By projection: how much of the colour is left."""

_MARKERS = {None: "o", "sft": "s", "dpo": "^", "sft-dpo": "D"}
_DPI = 130
PANELS = (
    ("lm loss", "SFT: loss (nats per token)"),
    ("dpo loss", "DPO: loss"),
    ("ogpsa removed", "share of ‖g‖² removed"),
)
"""Figures of the training log, and what their axes say."""


def write_plots(results: Results, folder: Path) -> list[Path]:
    """Write ``tasks.png``, ``tradeoff.png`` and, where there are curves, ``training.png``; returns their paths."""
    figures = {"tasks": task_figure(results), "tradeoff": tradeoff_figure(results)}
    if any(run.curves for run in results.runs):
        figures["training"] = training_figure(results)
    return [_save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def task_figure(results: Results) -> Figure:
    """Accuracy per general task, one bar for each variant, with the spread over seeds; projected variants are solid."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots()
    tasks = [*results.runs[0].scores[next(iter(results.variants))].accuracy]
    reads: list[Any] = [lambda scores, task=task: scores.accuracy[task] for task in tasks]
    reads.append(lambda scores: scores.general_accuracy)
    width = 0.84 / len(results.variants)
    for index, variant in enumerate(results.variants):
        offset = (index - (len(results.variants) - 1) / 2) * width
        estimates = [results.estimate(variant, read) for read in reads]
        look = _look(results, variant)
        fill = (
            {"color": look["color"]}
            if look["solid"]
            else {"color": "none", "edgecolor": look["color"], "hatch": "////"}
        )
        axes.bar(
            [place + offset for place in range(len(reads))],
            [100 * estimate_.mean for estimate_ in estimates],
            width * 0.9,
            yerr=[100 * (estimate_.deviation or 0.0) for estimate_ in estimates] if len(results.runs) > 1 else None,
            label=results.title(variant),
            **fill,
        )
    axes.axvline(len(tasks) - 0.5, color="0.8", linewidth=1)
    axes.set_xticks(range(len(tasks) + 1), [*tasks, "mean"])
    axes.set_ylim(0, 105)
    axes.set_ylabel("exact answers (%)")
    axes.set_title("General abilities before and after safety fine-tuning")
    _finish(axes)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(results.variants), frameon=False)
    return figure


def tradeoff_figure(results: Results) -> Figure:
    """Refusal on unsafe requests against general accuracy: a mark for the mean, dots for seeds, an arrow for each tax."""
    figure = Figure(figsize=(7.2, 5.0), layout="constrained")
    axes = figure.subplots()

    def place(variant: str) -> tuple[float, float]:
        refused = results.estimate(variant, lambda scores: scores.unsafe_refused).mean
        return 100 * refused, 100 * results.estimate(variant, lambda scores: scores.general_accuracy).mean

    for variant, description in results.variants.items():
        look = _look(results, variant)
        face = look["color"] if look["solid"] else "none"
        axes.scatter(
            *place(variant),
            marker=look["marker"],
            s=90,
            facecolors=face,
            edgecolors=look["color"],
            linewidths=1.6,
            zorder=3,
            label=results.title(variant),
        )
        if len(results.runs) > 1:
            points: list[Scores] = [run.scores[variant] for run in results.runs]
            axes.scatter(
                [100 * scores.unsafe_refused for scores in points],
                [100 * scores.general_accuracy for scores in points],
                s=10,
                color=look["color"],
                alpha=0.6,
            )
        if description and description.against:
            arrow = {"arrowstyle": "->", "color": look["color"], "shrinkA": 6, "shrinkB": 6}
            axes.annotate("", xy=place(variant), xytext=place(description.against), arrowprops=arrow)
    axes.set_xlim(-5, 105)
    axes.margins(y=0.12)
    axes.set_xlabel("unsafe requests refused (%)")
    axes.set_ylabel("general accuracy (%)")
    axes.set_title("Safety and what it costs: the upper right corner is best")
    _finish(axes)
    axes.legend(loc="center", frameon=False)
    return figure


def training_figure(results: Results) -> Figure:
    """What the log of the first seed says over the steps of each fine-tuning, a panel for each figure that it has."""
    curves = results.runs[0].curves
    panels = [panel for panel in PANELS if any(panel[0] in named for named in curves.values())]
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for variant in results.variants:
            curve = curves.get(variant, {}).get(name, Curve())
            if curve.steps:
                look = _look(results, variant)
                line = "-" if look["solid"] else "--"
                axes.plot(
                    curve.steps, curve.values, line, color=look["color"], linewidth=1.4, label=results.title(variant)
                )
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        _finish(axes)
        axes.legend(frameon=False)
    return figure


def _look(results: Results, variant: str) -> dict[str, Any]:
    """A colour and a mark for what is trained, a shade for how; plain variants are hollow, projected ones solid."""
    description = results.variants[variant]
    kind = None if description is None else description.against or variant
    shade = _SHADES[None if description is None else description.projection]
    return {
        "color": tuple(1 - shade * (1 - part) for part in to_rgb(_COLOURS[kind])),
        "marker": _MARKERS[kind],
        "solid": description is None or description.against is not None,
    }


def _finish(axes: Any) -> None:
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
