"""The study's results as data, a table and a plot."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure

from megatron_ogpsa.study.settings import PLAIN, SETTINGS
from megatron_ogpsa.study.tradeoff import LEVELS, Comparison, Curves, Point, Safety, at_the_end, compare, over_levels

NOTHING = "–"

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
"""Okabe and Ito's, which stay apart for colour-blind readers."""


LINES = ("-", "--", ":")
"""For more settings than colours."""


def write_report(curves: Curves, folder: Path) -> list[Path]:
    """Write ``table.md``, ``results.json`` and ``tradeoff.png``; returns their paths, the table first."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, plot = folder / "table.md", folder / "results.json", folder / "tradeoff.png"
    data.write_text(json.dumps(as_json(curves), indent=1) + "\n", encoding="utf-8")
    # Of the data, which are rounded: whoever makes the table of them anew gets the same.
    table.write_text(markdown_table(read_json(data)), encoding="utf-8")
    tradeoff_figure(curves).savefig(plot, dpi=130)
    return [table, data, plot]


def as_json(curves: Curves) -> dict[str, object]:
    """Every scored checkpoint, and where it was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("megatron-ogpsa", "megatron-core", "torch")},
        "device": f"CPU, {os.cpu_count()} cores",
        "runs": [
            {"setting": name, "seed": seed, "points": [point.as_json() for point in curve]}
            for name, by_seed in curves.items()
            for seed, curve in by_seed.items()
        ],
    }


def read_json(path: Path) -> Curves:
    """The curves that :func:`write_report` has written."""
    curves: dict[str, dict[int, list[Point]]] = {}
    for run in json.loads(path.read_text(encoding="utf-8"))["runs"]:
        curves.setdefault(run["setting"], {})[run["seed"]] = [Point(**point) for point in run["points"]]
    return curves


def markdown_table(curves: Curves, along: Safety = "told_apart") -> str:
    """A row for each setting.

    Growth of the general loss at each level of safety, with the number of seeds that reach it, also in plain fine-tuning;
    the shares of plain's growth that were avoided along all levels: of sums over seeds, the median over seeds, and seed by
    seed; of the last checkpoints, the growth, its share avoided, and what they refuse.
    """
    head = [
        *(f"at {level:.0%}" for level in LEVELS),
        "recovered",
        "median",
        "by seed",
        "at the end",
        "recovered there",
        "refused there: unsafe, harmless",
    ]
    lines = ["| setting | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, by_seed in curves.items():
        is_plain = name == PLAIN
        found = None if is_plain else over_levels(by_seed, curves[PLAIN], along)
        last = [curve[-1] for curve in by_seed.values()]
        unsafe, harmless = (fmean(getattr(point, f"{kind}_refused") for point in last) for kind in ("unsafe", "benign"))
        cells = [
            *(_growth(compare(by_seed, curves[PLAIN], level, along)) for level in LEVELS),
            _share(found.of_sums if found else None),
            _share(found.median if found else None),
            ", ".join(map(_share, found.by_seed.values())) if found else NOTHING,
            _mean([curve[-1].general_loss - curve[0].general_loss for curve in by_seed.values()]),
            NOTHING if is_plain else _share(at_the_end(by_seed, curves[PLAIN]).of_sums),
            f"{unsafe:.1%}, {harmless:.1%}",
        ]
        lines.append(f"| {SETTINGS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _growth(found: Comparison | None) -> str:
    return "n/a" if found is None else f"{_mean([*found.growths.values()])} ({len(found.growths)})"


def _mean(values: Sequence[float]) -> str:
    spread = f" ± {stdev(values):.4f}" if len(values) > 1 else ""
    return f"{fmean(values):+.4f}{spread}"


def _share(share: float | None) -> str:
    return NOTHING if share is None else f"{share:.0%}"


def tradeoff_figure(curves: Curves) -> Figure:
    """Growth of the general loss over refusal: thick the mean over seeds at each level, thin each seed's run."""
    figure = Figure(figsize=(11.0, 5.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, by_seed) in enumerate(curves.items()):
        colour, line = COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]
        for curve in by_seed.values():
            start = curve[0].general_loss
            axes.plot(
                [100 * point.told_apart for point in curve],
                [point.general_loss - start for point in curve],
                line,
                color=colour,
                linewidth=0.7,
                alpha=0.3,
            )
        means = [(level, found) for level in LEVELS if (found := compare(by_seed, curves[PLAIN], level))]
        axes.plot(
            [100 * level for level, _ in means],
            [found.growth for _, found in means],
            line,
            marker="o",
            markersize=4,
            color=colour,
            linewidth=2,
            label=SETTINGS[name].title,
        )
    axes.set_xlabel("unsafe requests refused, less harmless ones (%)")
    axes.set_ylabel("growth of the general loss (nats per token)")
    axes.set_title("What safety costs: lower is better, at the same safety")
    axes.set_xlim(0, 100)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
