"""What was measured as a page, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.precision.measuring import STORAGES

PAGE = Path(__file__).with_name("page.md").read_text(encoding="utf-8")


def as_markdown(result: Mapping[str, Any]) -> str:
    """The document."""
    measured: Sequence[Mapping[str, Any]] = result["measurements"]

    def largest(key: str, **where: Any) -> float:
        return max(m[key] for m in measured if all(m[name] == value for name, value in where.items()))

    def leak_of(storage: str, block: int) -> float:
        return max(
            m["span_leak_of_block"][block] for m in measured if (m["storage"], m["granularity"]) == (storage, "tensor")
        )

    separations = sorted({m["separation"] for m in measured}, reverse=True)
    rows = [
        [f"{separation:g}"]
        + [
            f"{largest('error', storage=storage, separation=separation):.0e} / "
            f"{largest('span_leak', storage=storage, separation=separation):.0e}"
            for storage in STORAGES
        ]
        for separation in separations
    ]
    by_size = [
        [f"{size:,}"] + [f"{leak_of(storage, block):.0e}" for storage in STORAGES]
        for block, size in enumerate(result["sizes"])
    ]
    return PAGE.format(
        date=result["date"],
        machine=result["machine"],
        versions=", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        millions=sum(result["sizes"]) / 1e6,
        table=_table(["separation", *STORAGES], rows),
        sizes=_table(["elements", *STORAGES], by_size),
        bf16_error=largest("error", storage="bf16"),
        bf16_leak=largest("span_leak", storage="bf16"),
        fp32_leak=largest("span_leak", storage="fp32"),
        bf16_large=leak_of("bf16", -1),
        references_error=largest("error", storage="bf16 references", separation=separations[-1]),
        corrected_gain=largest("span_leak", storage="bf16") / largest("span_leak", storage="bf16, corrected"),
        scaled_gain=largest("error", storage="bf16") / largest("error", storage="fp16, scaled"),
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Error over separation, leak over size, a line for each way of storing: the largest of all other cases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (errors, leaks) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for storage in STORAGES:
        own = [m for m in result["measurements"] if m["storage"] == storage]
        separations = sorted({m["separation"] for m in own})
        largest = [max(m["error"] for m in own if m["separation"] == separation) for separation in separations]
        errors.plot(separations, largest, marker="o", label=storage)
        by_tensor = [m["span_leak_of_block"] for m in own if m["granularity"] == "tensor"]
        leaks.plot(result["sizes"], [max(block) for block in zip(*by_tensor, strict=True)], marker="o", label=storage)
    errors.invert_xaxis()
    for axes, title, label in (
        (errors, "error of the projected gradient", "separation of the references"),
        (leaks, "leak into the references' span", "elements of the tensor"),
    ):
        axes.set(xscale="log", yscale="log", title=title, xlabel=label)
        axes.grid(alpha=0.3)
    errors.legend(loc="lower left", bbox_to_anchor=(0, 0.12))
    figure.savefig(path, dpi=110)
    plt.close(figure)
