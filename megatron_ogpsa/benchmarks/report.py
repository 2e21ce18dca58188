"""The page of all figures, from their data: ``python -m megatron_ogpsa.benchmarks.report docs/performance``.

The folder holds ``projection.json`` (:mod:`megatron_ogpsa.benchmarks.projection`), ``large.json`` (of longer vectors),
``growth.json`` (of more basis vectors and numbers of blocks, and with the passes in PyTorch), ``apart.json`` (of vectors that
lie apart), ``steps.jsonl`` (:mod:`megatron_ogpsa.benchmarks.step`, a line for each layout and rule), ``ranks.jsonl`` and
``vectors.jsonl`` (the same for each number of ranks, and of basis vectors), and ``training.json`` and ``in_turn.json``
(:mod:`megatron_ogpsa.benchmarks.training`, the latter with its steps in turn).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ogpsa.benchmarks import step
from megatron_ogpsa.benchmarks.page import PAGE
from megatron_ogpsa.errors import UserError

_COLOURS = {"dots": "#0072B2", "subtract": "#E69F00"}
_DPI = 130
_BAR_OF_ONE_BLOCK, _BAR_OF_BLOCKS = 0.8, 0.6
_ADDED = "milliseconds added to optimizer.step(), quartiles"
_PLAIN_STEP, _OWN_STEP = (f"milliseconds of optimizer.step(), {name}" for name in ("plain", "ogpsa"))

Json = dict[str, Any]

IN_TURN = "of plain, in turn"
"""In the data of whole runs."""


@dataclass(frozen=True)
class Data:
    """What the page is made of: the files of its folder, by their names."""

    projection: Json
    large: Json
    growth: Json
    apart: Json
    training: Json
    in_turn: Json
    steps: Sequence[Json]
    ranks: Sequence[Json]
    vectors: Sequence[Json]

    @classmethod
    def of(cls, folder: Path) -> Data:
        """All files of ``folder``.

        Raises:
            UserError: one of them is missing, or cannot be read.
        """

        def text(name: str) -> str:
            try:
                return (folder / name).read_text(encoding="utf-8")
            except OSError as error:
                raise UserError(f"{folder / name}: {error.strerror}; the page is made of all its data") from error

        def lines(name: str) -> list[Json]:
            return [json.loads(line) for line in text(f"{name}.jsonl").splitlines()]

        return cls(
            **{
                name: json.loads(text(f"{name}.json"))
                for name in ("projection", "large", "growth", "apart", "training", "in_turn")
            },
            steps=lines("steps"),
            ranks=lines("ranks"),
            vectors=lines("vectors"),
        )


def as_markdown(data: Data) -> str:
    """The page."""
    return PAGE.format(
        **_of_the_passes(data), **_of_steps(data), **_of_training(data.training), **_of_steps_in_turn(data.in_turn)
    )


def _of_the_passes(data: Data) -> Json:
    _require_one_measurement(data)
    slower = [_both(result, " in PyTorch") / _both(result) for result in data.growth["results"]]
    per_block = _microseconds_per_block(data.growth["results"])
    apart = [one["passes"][f"{name} apart"]["times"] for one in data.apart["results"] for name in _COLOURS]
    projection = data.projection
    measured = [result for account in (projection, data.large, data.growth) for result in account["results"]]
    missed = _below_the_bar(measured)
    return {
        "num_measured": len(_COLOURS) * len(measured),
        "num_missed": sum(map(len, missed.values())),
        "missed": "; ".join(
            f"{kind} {min(shares):.0%}" + (f" to {max(shares):.0%} ({len(shares)} times)" if len(shares) > 1 else "")
            for kind, shares in missed.items()
        ),
        "projection_command": projection["command"],
        "large_command": data.large["command"],
        "projection_date": projection["date"],
        "device": projection["device"],
        "threads": projection["threads"],
        "threads_plural": "s" if projection["threads"] > 1 else "",
        "versions": ", ".join(f"{name} {version}" for name, version in projection["versions"].items()),
        "projection": in_markdown(_projection_rows([*projection["results"], *data.large["results"]])),
        "num_blocks": max(result["blocks"] for result in projection["results"]),
        "growth_command": data.growth["command"],
        "in_pytorch_least": min(slower),
        "in_pytorch_most": max(slower),
        "apart_command": data.apart["command"],
        "apart_vectors": data.apart["results"][0]["blocks"],
        "apart_least": min(apart),
        "apart_most": max(apart),
        "per_block_least": min(per_block),
        "per_block_most": max(per_block),
    }


def _of_steps(data: Data) -> Json:
    first = data.steps[0]
    return {
        "parameters": first["parameters"] * first["tensor parallel"] / 1e6,
        **{name: first["arguments"][name] for name in ("seq_length", "micro_batch_size", "accumulate")},
        "steps_dates": " and ".join(sorted({one["date"] for one in data.steps})),
        "steps_cores": first["cores"],
        "steps": in_markdown(_step_rows(data.steps)),
        "steps_commands": commands(data.steps),
        "memory": in_markdown(_memory_rows(data.steps)),
        "tensors": data.vectors[0]["tensors"],
        "growth_commands": commands([*data.ranks, *data.vectors]),
        "ranks": in_markdown(_growth_rows(data.ranks)),
        "ranks_cores": data.ranks[0]["cores"],
        "vectors": in_markdown(_growth_rows(data.vectors)),
    }


def _of_training(training: Json) -> Json:
    tokens = [f"{one['tokens of a step']:.0f}" for one in training["results"] if one["setting"] == "plain"]
    intervals = {f"{one['stage']}_interval": one["steps from one refresh to the next"] for one in training["results"]}
    return {
        "training": in_markdown(training_rows(training["results"])),
        "training_command": training["command"],
        "training_date": training["date"],
        "training_cores": training["cores"],
        "reference_samples": training["reference samples"],
        "tokens_of_a_step": " or ".join(tokens),
        **intervals,
    }


def _of_steps_in_turn(training: Json) -> Json:
    told = {f"in_turn_{name}": training[name] for name in ("command", "date", "cores")}
    for one in training["results"]:
        if one[IN_TURN] is not None:
            told |= {f"in_turn_{one['stage']}": one[IN_TURN], f"runs_{one['stage']}": one["of plain"]}
    return told


def _projection_rows(results: Iterable[Json]) -> list[list[str]]:
    rows = [["elements", "basis", "k", "blocks", "triad", "dots", "", "subtract", "", "both, ms"]]
    for result in results:
        speeds = result["passes"]
        cells = [f"{result['elements']:.0e}".replace("e+0", "e"), result["basis_dtype"], str(result["rank"])]
        cells += [str(result["blocks"]), f"{speeds['triad']['gigabytes_per_second']:.1f} GB/s"]
        for name in ("dots", "subtract"):
            cells += [f"{speeds[name]['gigabytes_per_second']:.1f} GB/s", f"{speeds[name]['of_triad']:.0%}"]
        cells.append(f"{_both(result):.1f}")
        rows.append(cells)
    return rows


def _below_the_bar(results: Iterable[Json]) -> dict[str, list[float]]:
    """Shares of a triad that are, by what was measured."""
    missed: dict[str, list[float]] = {}
    for result in results:
        one_block = result["blocks"] == 1
        for name in _COLOURS:
            if (share := result["passes"][name]["of_triad"]) < (_BAR_OF_ONE_BLOCK if one_block else _BAR_OF_BLOCKS):
                where = "one block" if one_block else f"{result['blocks']} blocks"
                missed.setdefault(f"{name} of a basis in {result['basis_dtype']} in {where}", []).append(share)
    return missed


def _both(result: Json, kind: str = "") -> float:
    """Milliseconds of both passes."""
    return float(sum(result["passes"][name + kind]["milliseconds"] for name in _COLOURS))


def _microseconds_per_block(results: Iterable[Json]) -> list[float]:
    """Of both passes, from the fewest blocks to the most, for each number of basis vectors."""
    by_rank: dict[int, list[Json]] = {}
    for result in results:
        by_rank.setdefault(result["rank"], []).append(result)
    slopes = []
    for own in by_rank.values():
        first, *_, last = sorted(own, key=lambda result: int(result["blocks"]))
        slopes.append(1e3 * (_both(last) - _both(first)) / (last["blocks"] - first["blocks"]))
    return slopes


def _step_rows(steps: Iterable[Json]) -> list[list[str]]:
    titles = ["layout", "space", "mode", "plain step", "OGPSA / plain", "authors / plain", "optimizer.step()"]
    rows = [[*titles, "collectives", "beside passes"]]
    for one in steps:
        rows.append(
            [
                *_layout_and_rule(one),
                f"{one['seconds of a plain step']:.2f} s",
                f"{one['ogpsa / plain']:.3f}",
                f"{one['authors / plain']:.3f}",
                f"{one[_PLAIN_STEP]:.0f} → {one[_OWN_STEP]:.0f} ms",
                f"{one['collectives of a step, plain']} → {one['collectives of a step, ogpsa']}",
                f"{one['refresh: share beside its passes']:.1%} of a refresh, "
                f"{one['refresh: milliseconds beside its passes']:.0f} ms",
            ]
        )
    return rows


def _layout_and_rule(one: Json) -> list[str]:
    data_parallel = one["world size"] // one["tensor parallel"]
    return [f"TP{one['tensor parallel']} × DP{data_parallel}", one["arguments"]["space"], one["arguments"]["mode"]]


def _memory_rows(steps: Iterable[Json]) -> list[list[str]]:
    titles = ["layout", "space", "mode", "basis", "authors' copies", "highest: step", "refresh", "authors' step"]
    rows = [titles]
    for one in steps:
        held = [one["bytes of the basis"], one["bytes of the authors' copies"]]
        above = {
            name: one[f"peak bytes, {name}"] - one["peak bytes, plain"] for name in ("ogpsa", "refresh", "authors")
        }
        above["authors"] -= one["bytes of the basis"]  # which lies beside the copies, but belongs to neither
        cells = [
            f"{held_bytes / one["elements of this rank's shard"]:.1f} B" for held_bytes in [*held, *above.values()]
        ]
        rows.append([*_layout_and_rule(one), *cells])
    return rows


def _growth_rows(lines: Iterable[Json]) -> list[list[str]]:
    rows = [["ranks", "k", "granularity", "elements of a shard", "plain step", "optimizer.step(), plain", "added"]]
    rows[0] += ["of a step", "OGPSA / plain", "beside passes", "load"]
    for one in lines:
        lower, median, upper = one[_ADDED]
        rows.append(
            [
                str(one["world size"]),
                str(one["basis vectors"]),
                one["arguments"]["granularity"],
                f"{one["elements of this rank's shard"] / 1e6:.1f}M",
                f"{one['seconds of a plain step']:.2f} s",
                f"{one[_PLAIN_STEP]:.0f} ms",
                f"{median:.0f} ms ({lower:.0f} to {upper:.0f})",
                f"{median / one['seconds of a plain step'] / 10:.1f}%",
                f"{one['ogpsa / plain']:.3f}",
                f"{one['refresh: share beside its passes']:.1%} of a refresh",
                f"{one['load average']:.1f}",
            ]
        )
    return rows


def commands(lines: Iterable[Json]) -> str:
    """What measured each line, with the flags that are not the benchmark's own."""
    usual = vars(step.parser().parse_args([]))
    commands = []
    for one in lines:
        flags = [
            {"False": f"--no-{name}", "True": f"--{name}"}.get(value, f"--{name.replace('_', '-')} {value}")
            for name, value in one["arguments"].items()
            if value != str(usual[name]) and name != "json"
        ]
        own = ["torchrun --nproc-per-node", str(one["world size"]), "-m megatron_ogpsa.benchmarks.step", *flags]
        commands.append(" ".join(own))
    return "\n".join(commands)


def training_rows(results: Iterable[Json]) -> list[list[str]]:
    """Of :mod:`megatron_ogpsa.benchmarks.training`: a line for each stage and setting, with the range of its steps.

    With a column for what was measured step by step in one run, if anything was.
    """
    told = [*results]
    titles = ["stage", "setting", "of positions are tokens", "a step, s", "tokens/s", "of plain", "a refresh, s"]
    titles += ["of plain, with refreshes"]
    titles += ["of plain, steps in turn"] if any(result.get(IN_TURN) for result in told) else []
    rows = [titles]
    for result in told:
        refresh = result["seconds of a refresh"]
        cells = [
            result["stage"],
            result["setting"],
            f"{result['share of positions that are tokens']:.1%}",
            f"{result['seconds of a step']:.3g}" + _range(result.get("seconds of each step", [])),
            f"{result['tokens per second']:.0f}",
            f"{result['of plain']:.3f}",
            "–" if refresh is None else f"{refresh:.1f}",
            f"{result['of plain, with refreshes']:.3f}",
            f"{result[IN_TURN]:.3f}" if result.get(IN_TURN) else "–",
        ]
        rows.append(cells[: len(titles)])
    return rows


def _range(rounds: Iterable[Sequence[float]]) -> str:
    seconds = [one for of_round in rounds for one in of_round]
    return f" ({min(seconds):.3g} to {max(seconds):.3g})" if seconds else ""


def in_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row as the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(growth: Json, path: Path) -> None:
    """Milliseconds of both passes against k, and against the number of blocks."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    results = growth["results"]
    fewest, smallest = min(r["blocks"] for r in results), min(r["rank"] for r in results)
    for axes, key, chosen in (
        (left, "rank", [r for r in results if r["blocks"] == fewest]),
        (right, "blocks", [r for r in results if r["rank"] == smallest]),
    ):
        for name, colour in _COLOURS.items():
            points = sorted((result[key], result["passes"][name]["milliseconds"]) for result in chosen)
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("milliseconds")
        axes.legend()
    left.set_xlabel(f"basis vectors k ({fewest} block)")
    right.set_xlabel(f"blocks (k = {smallest})")
    right.set_xscale("log")
    figure.suptitle(f"{results[0]['elements']:.0e} elements, fp32, {growth['device']}")
    figure.savefig(path, dpi=_DPI)


def plot_overhead(ranks: Sequence[Json], vectors: Sequence[Json], path: Path) -> None:
    """What projection adds to a step, against the number of ranks, and against k for each granularity."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_added(left, "world size", ranks, color=_COLOURS["dots"])
    left.set_xlabel(f"ranks ({ranks[0]['cores']} cores; k = {ranks[0]['basis vectors']})")
    left.set_xscale("log", base=2)
    left.set_xticks([one["world size"] for one in ranks], [str(one["world size"]) for one in ranks])
    for granularity, colour in zip(("model", "tensor"), _COLOURS.values(), strict=True):
        chosen = [one for one in vectors if one["arguments"]["granularity"] == granularity]
        blocks = chosen[0]["tensors"] if granularity == "tensor" else 1
        label = f"{granularity}, {blocks} block{'s' if blocks > 1 else ''}"
        _draw_added(right, "basis vectors", chosen, color=colour, label=label)
    right.set_xlabel(f"basis vectors k ({vectors[0]['world size']} ranks)")
    right.legend()
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.set_ylabel("milliseconds added to optimizer.step()")
    figure.savefig(path, dpi=_DPI)


def _draw_added(axes: Axes, key: str, lines: Sequence[Json], *, color: str, label: str = "") -> None:
    """Medians, and quartiles as bars."""
    lower, median, upper = zip(*(one[_ADDED] for one in lines), strict=True)
    bars = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((lower, median), (median, upper))]
    axes.errorbar([one[key] for one in lines], median, yerr=bars, marker="o", capsize=3, color=color, label=label)


def main(argv: list[str] | None = None) -> int:
    """Write ``FOLDER.md`` and the plots in ``FOLDER``."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.report")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    try:
        data = Data.of(folder)
        page = as_markdown(data)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    plot(data.growth, folder / "growth.png")
    plot_overhead(data.ranks, data.vectors, folder / "overhead.png")
    folder.with_suffix(".md").write_text(page, encoding="utf-8")
    return 0


def _require_one_measurement(data: Data) -> None:
    """The page says once for all passes when, where and with what they were measured."""
    accounts = (data.projection, data.large, data.growth, data.apart)
    if (
        len({json.dumps([account[name] for name in ("date", "device", "threads", "versions")]) for account in accounts})
        > 1
    ):
        raise UserError(
            "projection.json, large.json, growth.json and apart.json are of other days, machines or versions, and the page "
            "has one line for them: measure all of them again"
        )


def page_of(folder: Path) -> str:
    """The page that belongs to the data in ``folder``."""
    return as_markdown(Data.of(folder))


if __name__ == "__main__":
    sys.exit(main())
