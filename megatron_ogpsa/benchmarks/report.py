"""The page of all figures, from their data: ``python -m megatron_ogpsa.benchmarks.report docs/performance``.

The folder holds ``projection.json`` (:mod:`megatron_ogpsa.benchmarks.projection`), ``large.json`` (of longer vectors),
``growth.json`` (of more basis vectors and numbers of blocks, and with the passes in PyTorch), ``steps.jsonl``
(:mod:`megatron_ogpsa.benchmarks.step`, a line for each layout and rule), ``ranks.jsonl`` and ``vectors.jsonl`` (the same for
each number of ranks, and of basis vectors), and ``training.json`` (:mod:`megatron_ogpsa.benchmarks.training`).
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

_COLOURS = {"dots": "#0072B2", "subtract": "#E69F00"}
_DPI = 130
_BAR_OF_ONE_BLOCK, _BAR_OF_BLOCKS = 0.8, 0.6
_ADDED = "milliseconds added to optimizer.step(), quartiles"
_PLAIN_STEP, _OWN_STEP = (f"milliseconds of optimizer.step(), {name}" for name in ("plain", "ogpsa"))

Json = dict[str, Any]

_PAGE = """# What projection costs

Every figure here is a ratio, or stands beside one: medians over rounds in which the things that are compared take turns, so
that a machine that is shared or changes its speed is fair to all of them. Made by
`python -m megatron_ogpsa.benchmarks.report docs/performance` from the data in [performance](performance). Those of a GPU have
[a page of their own](gpu.md).

## The two passes

`{projection_command}`, and of the longest vectors `{large_command}` ({projection_date}; {device};
{threads} thread{threads_plural}; {versions}).

A projected step reads the gradient and the basis twice and writes the gradient once: dots c = Qᵀg with ‖g‖², in fp64; then
g ← g − Q·r. Given as a share of the bandwidth of a triad (a = b + s·c, fp32) of the same size in the same round. Above 100 %
are passes that write less than a triad, whose written memory the processor first reads.

{projection}

One block is granularity *model*; {num_blocks} are *tensor*, and a third of them have a hundredth of the others'
elements. A basis in bf16 halves the bytes and not the arithmetic: each element is widened to fp64 in registers, and dots are
then bound by that, not by memory.

The bar is 80 % in one block and 60 % in {num_blocks}. Of {num_measured} passes, those of the plot below too, {num_missed} are
below it: {missed}.

![Milliseconds against the number of basis vectors, and against the number of blocks](performance/growth.png)

`{growth_command}`: time grows with the bytes, which are linear in k; with thousands of blocks
a block adds {per_block_least:.1f} to {per_block_most:.1f} µs, by k. Tile by tile in PyTorch, as they were before they were
compiled, the two passes take {in_pytorch_least:.1f} to {in_pytorch_most:.1f} times as long.

## A training step

A GPT of {parameters:.0f}M parameters, sequences of {seq_length}, micro-batches of {micro_batch_size}, {accumulate}
accumulated, two references, per tensor: plain, projected, and with the hooks of the authors' released code (whole copies
of the references on each rank, brought to the gradient's device and orthonormalised anew in each tensor's hook on each
micro-batch), in turn in one process group ({steps_dates}; {steps_cores} cores, a thread a rank):

```bash
{steps_commands}
```

{steps}

The default rule adds one collective to a step, and the paper's none: its sums ride in the all-reduce of the norm. On CPU
the authors' copies lie beside the gradient, so that bringing them there, which on a GPU crosses the bus on every micro-batch,
costs nothing here. *Beside passes* is what a refresh takes beside its reference passes:
capturing, one all-reduce, orthonormalising.

Memory, of the rank that prints, as bytes for an element of its shard: what is held from one step to the next, and by how
much the highest resident set of a step, or of a refresh, is above a plain step's. That also counts what the allocator did not
give back in between. In a refresh the new references stand beside the basis in use.

{memory}

## Growth

What projection adds to `optimizer.step()`, against the number of ranks, each with a shard of about the same size, and against
the number of basis vectors, with the whole model as one block and with one for each of {tensors} tensors.

![Milliseconds added to a step, against ranks and against basis vectors](performance/overhead.png)

```bash
{growth_commands}
```

{ranks}

Each rank has as much to read, and all read through one memory bus: alone on it a rank has the whole. On {ranks_cores} cores
more ranks than that take turns besides, so that what is to be compared is the share of the step. Against basis vectors:

{vectors}

Medians over rounds of the difference within a round, with quartiles, and the machine's load average, which the measured
ranks are part of; of the paper's rule. *OGPSA / plain* is of whole steps, which differ by more than what is added from one
to the next on a machine as busy as that, and so do the lines of one column: they say no more than what is near what. The
passes by themselves (above) are linear in k. With one micro-batch in a step, as here, a refresh passes over one for each
reference, a quarter of what it does in the table of steps above, so that what is *beside passes* weighs more.

## Whole runs

`{training_command}` ({training_date}, {training_cores} cores): SFT and DPO of a real model of 135M parameters on packed
rows of real data, with `megatron-ogpsa train`. Tokens of the data in a second, padding not counted; *with refreshes* spreads
one of {reference_samples} conversations over the paper's {sft_interval} steps in SFT and {dpo_interval} in DPO.

{training}

With a batch as small as here a refresh weighs much: it passes over {reference_samples} conversations, a step over
{tokens_of_a_step} tokens. [plan](planning.md) tells the share for a run on a cluster. *TRL* is its trainers in one process
on all cores, as they run on one GPU: the same model and conversations, micro-batches of up to four samples padded to their
longest, in autocast to bf16 where Megatron has bf16 weights; *authors* adds the rule of their released code, by hooks on each
parameter with a copy of the reference in host memory. It packs nothing: in SFT half of its positions are padding. In the few
steps of DPO that count, of two pairs each, lengths happened to be alike.

A refresh finds its reference data ready: they are tokenized once, when the run starts, cut into each rank's micro-batches
and kept in host memory, page-locked where there is a GPU. Nothing is read from disk or tokenized during a refresh.

## Elsewhere

On a GPU: [gpu.md](gpu.md). What cheaper refreshes (fewer samples, longer intervals, references in turn) leave of the
protection is measured in the [study](study/README.md).
"""


@dataclass(frozen=True)
class Data:
    """What the page is made of: the files of its folder, by their names."""

    projection: Json
    large: Json
    growth: Json
    training: Json
    steps: Sequence[Json]
    ranks: Sequence[Json]
    vectors: Sequence[Json]

    @classmethod
    def of(cls, folder: Path) -> Data:
        """All files of ``folder``."""

        def text(name: str) -> str:
            return (folder / name).read_text(encoding="utf-8")

        def lines(name: str) -> list[Json]:
            return [json.loads(line) for line in text(f"{name}.jsonl").splitlines()]

        return cls(
            **{name: json.loads(text(f"{name}.json")) for name in ("projection", "large", "growth", "training")},
            steps=lines("steps"),
            ranks=lines("ranks"),
            vectors=lines("vectors"),
        )


def as_markdown(data: Data) -> str:
    """The page."""
    return _PAGE.format(**_of_the_passes(data), **_of_steps(data), **_of_training(data.training))


def _of_the_passes(data: Data) -> Json:
    slower = [_both(result, " in PyTorch") / _both(result) for result in data.growth["results"]]
    per_block = _microseconds_per_block(data.growth["results"])
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
    in_turn = "of plain, in turn"
    titles = ["stage", "setting", "of positions are tokens", "a step, s", "tokens/s", "of plain", "a refresh, s"]
    titles += ["of plain, with refreshes"]
    titles += ["of plain, steps in turn"] if any(result.get(in_turn) for result in told) else []
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
            f"{result[in_turn]:.3f}" if result.get(in_turn) else "–",
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
    data = Data.of(folder)
    plot(data.growth, folder / "growth.png")
    plot_overhead(data.ranks, data.vectors, folder / "overhead.png")
    folder.with_suffix(".md").write_text(as_markdown(data), encoding="utf-8")
    return 0


def page_of(folder: Path) -> str:
    """The page that belongs to the data in ``folder``."""
    return as_markdown(Data.of(folder))


if __name__ == "__main__":
    sys.exit(main())
