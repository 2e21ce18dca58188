"""The page of all figures, from their data: ``python -m megatron_ogpsa.benchmarks.report docs/performance``.

The folder holds ``projection.json`` (:mod:`megatron_ogpsa.benchmarks.projection`), ``large.json`` (of longer vectors),
``growth.json`` (of more ranks and numbers of blocks, and with the passes in PyTorch), and ``steps.jsonl``
(:mod:`megatron_ogpsa.benchmarks.step`, a line for each layout).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_COLOURS = {"dots": "#0072B2", "subtract": "#E69F00"}
_DPI = 130

Json = dict[str, Any]

_PAGE = """# What projection costs

Every figure here is a ratio, or stands beside one: medians over rounds in which the things that are compared take turns, so
that a machine that is shared or changes its speed is fair to all of them. Made by
`python -m megatron_ogpsa.benchmarks.report docs/performance` from the data in [performance](performance). No figure of a GPU
is known yet: both benchmarks are written to run there too, which has not been tried.

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

![Milliseconds against the number of basis vectors, and against the number of blocks](performance/growth.png)

`{growth_command}`: time grows with the bytes, which are linear in k; with thousands of blocks
it grows by {per_block:.1f} µs a block. Tile by tile in PyTorch, as they were before they were compiled, the two passes take
{in_pytorch_least:.1f} to {in_pytorch_most:.1f} times as long.

## A training step

A GPT of {parameters:.0f}M parameters, sequences of {seq_length}, micro-batches of {micro_batch_size}, {accumulate}
accumulated, two references, per tensor: plain, projected, and with the hooks of the authors' released code (whole copies
of the references on each rank, brought to the gradient's device and orthonormalised anew in each tensor's hook on each
micro-batch), in turn in one process group; then with `--tensor-model-parallel-size 2`, and with `--space update`:

```bash
torchrun --nproc-per-node 2 -m megatron_ogpsa.benchmarks.step --json docs/performance/steps.jsonl
```

{steps}

A projected step has as many collectives as a plain one: its sums ride in the all-reduce of the norm. With updates projected
it is one more. On CPU the authors' copies lie beside the gradient, so that bringing them there, which on a GPU crosses
the bus on every micro-batch, costs nothing here. *Beside passes* is what a refresh takes beside its reference passes:
capturing, one all-reduce, orthonormalising. Rows that give its milliseconds have these passes compiled, the others had
them tile by tile in PyTorch. The rows were not measured side by side: how busy other jobs kept the machine shows in the
time of a plain step, and where it is longer the ratios scatter more.

A refresh finds its reference data ready: they are tokenized once, when the run starts, cut into each rank's micro-batches
and kept in host memory, page-locked where there is a GPU. Nothing is read from disk or tokenized during a refresh.

## Not measured

GPUs, FP8, tokens per second of whole runs, a trainer of another library on the same tokens, more processes than two,
cheaper refreshes (staggered references).
"""


def as_markdown(projection: Json, large: Json, growth: Json, steps: Sequence[Json]) -> str:
    """The page."""
    arguments = steps[0]["arguments"]
    slower = [_both(result, " in PyTorch") / _both(result) for result in growth["results"]]
    return _PAGE.format(
        projection_command=projection["command"],
        large_command=large["command"],
        projection_date=projection["date"],
        device=projection["device"],
        threads=projection["threads"],
        threads_plural="s" if projection["threads"] > 1 else "",
        versions=", ".join(f"{name} {version}" for name, version in projection["versions"].items()),
        projection=_table(_projection_rows([*projection["results"], *large["results"]])),
        num_blocks=max(result["blocks"] for result in projection["results"]),
        growth_command=growth["command"],
        in_pytorch_least=min(slower),
        in_pytorch_most=max(slower),
        per_block=_microseconds_per_block(growth["results"]),
        parameters=steps[0]["parameters"] * steps[0]["tensor parallel"] / 1e6,
        seq_length=arguments["seq_length"],
        micro_batch_size=arguments["micro_batch_size"],
        accumulate=arguments["accumulate"],
        steps=_table(_step_rows(steps)),
    )


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


def _both(result: Json, kind: str = "") -> float:
    """Milliseconds of both passes."""
    return float(sum(result["passes"][name + kind]["milliseconds"] for name in _COLOURS))


def _microseconds_per_block(results: Sequence[Json]) -> float:
    """Of both passes, from the fewest blocks to the most, at the smallest rank."""
    rank = min(result["rank"] for result in results)
    by_blocks = sorted((r for r in results if r["rank"] == rank), key=lambda result: int(result["blocks"]))
    first, last = by_blocks[0], by_blocks[-1]
    return max(0.0, 1e3 * (_both(last) - _both(first)) / (last["blocks"] - first["blocks"]))


def _step_rows(steps: Iterable[Json]) -> list[list[str]]:
    titles = ["layout", "space", "plain step", "OGPSA / plain", "authors / plain", "optimizer.step()", "collectives"]
    rows = [[*titles, "basis", "authors' copies", "beside passes"]]
    for step in steps:
        data_parallel = step["world size"] // step["tensor parallel"]
        rows.append(
            [
                f"TP{step['tensor parallel']} × DP{data_parallel}",
                step["arguments"]["space"],
                f"{step['seconds of a plain step']:.2f} s",
                f"{step['ogpsa / plain']:.3f}",
                f"{step['authors / plain']:.3f}",
                f"{step['milliseconds of optimizer.step(), plain']:.0f} → "
                f"{step['milliseconds of optimizer.step(), ogpsa']:.0f} ms",
                f"{step['collectives of a step, plain']} → {step['collectives of a step, ogpsa']}",
                f"{step['bytes of the basis'] / step["elements of this rank's shard"]:.1f} B an element of the shard",
                f"{step["bytes of the authors' copies"] / step["elements of this rank's shard"]:.1f} B",
                _beside_passes(step),
            ]
        )
    return rows


def _beside_passes(step: Json) -> str:
    share = f"{step['refresh: share beside its passes']:.1%} of a refresh"
    milliseconds = step.get("refresh: milliseconds beside its passes")  # older data have none
    return share if milliseconds is None else f"{share}, {milliseconds:.0f} ms"


def _table(rows: Sequence[Sequence[str]]) -> str:
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


def main(argv: list[str] | None = None) -> int:
    """Write ``FOLDER.md`` and ``FOLDER/growth.png``."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.report")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args(argv).folder
    growth = json.loads((folder / "growth.json").read_text(encoding="utf-8"))
    plot(growth, folder / "growth.png")
    folder.with_suffix(".md").write_text(page_of(folder), encoding="utf-8")
    return 0


def page_of(folder: Path) -> str:
    """The page that belongs to the data in ``folder``."""
    names = ("projection", "large", "growth")
    projection, large, growth = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names)
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return as_markdown(projection, large, growth, steps)


if __name__ == "__main__":
    sys.exit(main())
