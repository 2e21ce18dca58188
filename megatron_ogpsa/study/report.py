"""The study's results as data, a table and a plot."""

from __future__ import annotations

import datetime
import json
import os
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from megatron_ogpsa.study.settings import PLAIN, SETTINGS
from megatron_ogpsa.study.tradeoff import LEVELS, Comparison, Curves, Point, compare, over_levels

COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
"""Okabe and Ito's, which stay apart for colour-blind readers."""


def write_report(curves: Curves, folder: Path) -> list[Path]:
    """Write ``table.md``, ``results.json`` and ``tradeoff.png``; returns their paths, the table first."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, plot = folder / "table.md", folder / "results.json", folder / "tradeoff.png"
    table.write_text(markdown_table(curves), encoding="utf-8")
    data.write_text(json.dumps(as_json(curves), indent=1) + "\n", encoding="utf-8")
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


def markdown_table(curves: Curves) -> str:
    """A row for each setting.

    Growth of the general loss at each level of refusal with the number of seeds that reach it, also in plain fine-tuning;
    the share of plain's growth that was avoided, along all levels and, seed by seed, at the lowest; the change of accuracy
    there in points; the share refused by the last checkpoint.
    """
    lowest = f"at {LEVELS[0]:.0%}"
    head = [
        *(f"at {level:.0%}" for level in LEVELS),
        "recovered",
        f"{lowest}, by seed",
        f"accuracy {lowest}",
        "refused",
    ]
    lines = ["| setting | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name, by_seed in curves.items():
        compared = [compare(by_seed, curves[PLAIN], level) for level in LEVELS]
        last = [curve[-1] for curve in by_seed.values()]
        share = None if name == PLAIN else over_levels(by_seed, curves[PLAIN])
        first = compared[0]
        cells = [
            *map(_growth, compared),
            "–" if share is None else f"{share:.0%}",
            "–" if name == PLAIN or first is None else _by_seed(first),
            "n/a" if first is None else f"{100 * first.accuracy:+.1f}",
            f"{sum(point.unsafe_refused for point in last) / len(last):.0%}",
        ]
        lines.append(f"| {SETTINGS[name].title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _growth(found: Comparison | None) -> str:
    if found is None:
        return "n/a"
    spread = "" if found.deviation is None else f" ± {found.deviation:.3f}"
    return f"{found.growth:+.3f}{spread} ({found.seeds})"


def _by_seed(found: Comparison) -> str:
    return ", ".join("n/a" if share is None else f"{share:.0%}" for share in found.recovered_by_seed)


def tradeoff_figure(curves: Curves) -> Figure:
    """Growth of the general loss over refusal: thick the mean over seeds at each level, thin each seed's run."""
    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, by_seed) in enumerate(curves.items()):
        colour, line = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
        for curve in by_seed.values():
            start = curve[0].general_loss
            axes.plot(
                [100 * point.unsafe_refused for point in curve],
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
    axes.set_xlabel("unsafe requests refused (%)")
    axes.set_ylabel("growth of the general loss (nats per token)")
    axes.set_title("What safety costs: lower is better, at the same refusal")
    axes.set_xlim(0, 100)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
