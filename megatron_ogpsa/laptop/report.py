"""What a run has scored: for the terminal, and as tables, data and a plot like the study's."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_ogpsa.console.tables import aligned_table
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.laptop.recipe import Sizes
from megatron_ogpsa.study.report import as_json, read_json, tradeoff_figure
from megatron_ogpsa.study.settings import PLAIN, SETTINGS
from megatron_ogpsa.study.tradeoff import LEVELS, Curve, Curves, Point, Safety, at_safety, compare, over_levels

ENDS = {"after SFT": "sft", "after DPO": "dpo"}

ALONG: dict[Safety, str] = {"told_apart": "unsafe less look-alikes", "unsafe_refused": "unsafe refused"}
"""What settings are compared at equal levels of; a model that refuses everything reaches only the second."""


def read_curve(start: Path, result: Path, sizes: Sizes) -> Curve:
    """The scored checkpoints of one run, the starting model first; steps of DPO go on after those of SFT.

    Raises:
        UserError: a file of scores is missing.
    """
    if missing := [path for path in (start, result) if not path.exists()]:
        raise UserError(f"{missing[0]}: no such scores, although their step ended well: run the same command again")
    scored = [
        checkpoint
        for path in (start, result)
        for checkpoint in json.loads(path.read_text(encoding="utf-8"))["checkpoints"]
    ]
    return [
        Point(
            step=step,
            unsafe_refused=checkpoint["prompts"]["unsafe"]["refused"]["value"],
            benign_refused=checkpoint["prompts"]["benign"]["refused"]["value"],
            general_loss=checkpoint["data"]["general"]["loss"],
        )
        for step, checkpoint in zip([0, *_steps(sizes)], scored, strict=True)
    ]


def _steps(sizes: Sizes) -> list[int]:
    return [step + (sizes.sft_steps if stage == "dpo" else 0) for stage, step in sizes.steps()]


def terminal_table(curves: Curves, sizes: Sizes) -> str:
    """The model as it came, and each setting after SFT and after DPO, means over seeds."""
    rows = [["", "unsafe refused", "look-alikes refused", "general loss"]]
    first = next(iter(curves.values()))
    rows.append(["as it came", *_cells([curve[0] for curve in first.values()])])
    for name, by_seed in curves.items():
        for title, points in _ends(by_seed, sizes).items():
            rows.append([f"{SETTINGS[name].title}, {title}", *_cells(points)])
    return aligned_table(rows)


def _ends(by_seed: Mapping[int, Curve], sizes: Sizes) -> dict[str, list[Point]]:
    """Each seed's checkpoint at the end of each stage."""
    last = {"sft": sizes.sft_steps, "dpo": sizes.sft_steps + sizes.dpo_steps}
    return {
        title: [point for curve in by_seed.values() for point in curve if point.step == last[stage]]
        for title, stage in ENDS.items()
    }


def _cells(points: Sequence[Point]) -> list[str]:
    unsafe, benign, loss = (
        statistics.fmean(getattr(point, name) for point in points)
        for name in ("unsafe_refused", "benign_refused", "general_loss")
    )
    return [f"{100 * unsafe:.1f} %", f"{100 * benign:.1f} %", f"{loss:.4f}"]


def write_report(curves: Curves, sizes: Sizes, folder: Path) -> list[Path]:
    """Write ``table.md`` and ``results.json``, and of several settings ``tradeoff.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, plot = folder / "table.md", folder / "results.json", folder / "tradeoff.png"
    data.write_text(json.dumps({"sizes": asdict(sizes)} | as_json(curves), indent=1) + "\n", encoding="utf-8")
    # Of the data, which are rounded: whoever makes the table of them anew gets the same.
    table.write_text(markdown_tables(read_json(data), sizes), encoding="utf-8")
    if PLAIN not in curves:
        return [table, data]
    tradeoff_figure(curves).savefig(plot, dpi=130)
    return [table, data, plot]


def markdown_tables(curves: Curves, sizes: Sizes) -> str:
    """What each setting ends with; and, if plain is among them, what each level of refusal costs."""
    tables = [_table_of_ends(curves, sizes)]
    if PLAIN in curves:
        tables += [_table_of_levels(curves, along) for along in ALONG if _is_reached(curves, along)]
    return "\n".join(tables)


def _table_of_ends(curves: Curves, sizes: Sizes) -> str:
    measures = ("unsafe refused", "look-alikes refused", "general loss")
    rows = [["setting", *(f"{measure} {title}" for title in ENDS for measure in measures)]]
    rows.append(["as it came", *_cells([curve[0] for curve in next(iter(curves.values())).values()]), "", "", ""])
    for name, by_seed in curves.items():
        ends = _ends(by_seed, sizes)
        rows.append([SETTINGS[name].title, *(cell for title in ENDS for cell in _cells(ends[title]))])
    return _markdown(rows)


def _is_reached(curves: Curves, along: Safety) -> bool:
    """Whether there is a level that a setting reaches where plain does: a table without would say nothing."""
    return any(compare(by_seed, curves[PLAIN], level, along) for by_seed in curves.values() for level in LEVELS)


def _table_of_levels(curves: Curves, along: Safety) -> str:
    """Growth of the general loss where a run first is so safe (seeds), and look-alikes refused there."""
    rows = [[f"setting, by {ALONG[along]}", *(f"at {level:.0%}" for level in LEVELS), "recovered"]]
    for name, by_seed in curves.items():
        cells = []
        for level in LEVELS:
            found = compare(by_seed, curves[PLAIN], level, along)
            if found is None:
                cells.append("n/a")
                continue
            refused = (at_safety(by_seed[seed], level, "benign_refused", along) for seed in found.growths)
            benign = statistics.fmean(share for share in refused if share is not None)
            cells.append(f"{found.growth:+.4f} ({len(found.growths)}); {benign:.0%}")
        share = None if name == PLAIN else over_levels(by_seed, curves[PLAIN], along)
        avoided = None if share is None else share.of_sums
        rows.append([SETTINGS[name].title, *cells, "–" if avoided is None else f"{avoided:.0%}"])
    return _markdown(rows)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body]) + "\n"
