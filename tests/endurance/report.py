"""The outcome of long runs as a table and a plot."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.endurance.judging import MEMORY_TOLERANCE, SETTLED_STEP, Sample

MIB = 2**20


def as_markdown(result: Mapping[str, Any]) -> str:
    """The document: one row for each rank."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [
        "# Long runs",
        "",
        f"`python -m tests.endurance`: {result['steps']:,} steps of SFT (TP2, refreshed every 30 steps) and of DPO (DP2, "
        "every 5), a checkpoint every 500 of which only the last is kept, the watch over hangs on. Each rank is looked at "
        f"every 20 steps, from outside. {result['date']}, CPU ({result['machine']}), {versions}.",
        "",
        f"Asked: from step {SETTLED_STEP} on, resident memory never more than {MEMORY_TOLERANCE:.0%} above that step's, "
        "and one number of open file descriptors. A rank is not stopped to be looked at: descriptors count that are open in "
        "two looks, one after the other; what was open in one only is named below the table.",
        "",
        "![Memory and open descriptors of each rank over the steps](endurance.png)",
        "",
        f"| run | rank | memory at step {SETTLED_STEP} | most after it | unshared: most after it | slope | descriptors |  |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stage, outcome in result["stages"].items():
        for verdict in outcome["verdicts"]:
            descriptors = ", ".join(map(str, verdict["descriptors"]))
            holds = verdict["growth"] <= MEMORY_TOLERANCE and len(verdict["descriptors"]) == 1
            lines.append(
                f"| {stage}, {outcome['seconds']:.0f} s | {verdict['rank']} | {verdict['settled'] / MIB:.1f} MiB "
                f"| {verdict['growth']:+.2%} | {verdict['unshared_growth']:+.2%} | {verdict['slope'] / 1024:+.2f} KiB a step "
                f"| {descriptors} | {'holds' if holds else '**does not hold**'} |"
            )
    passing = {
        re.sub(r"\d{3,}", "…", Path(name).name): stage
        for stage, outcome in result["stages"].items()
        for verdict in outcome["verdicts"]
        for name in verdict["passing"]
    }
    if passing:
        lines += ["", "Open in one look: " + ", ".join(f"`{name}` ({stage})" for name, stage in passing.items()) + "."]
    return "\n".join(lines) + "\n"


def plot(samples: Mapping[str, Sequence[Sample]], path: Path) -> None:
    """Memory relative to the settled step's, above; open descriptors, below; a column for each run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = plt.subplots(
        2, len(samples), sharex=True, figsize=(11, 6), height_ratios=(2, 1), layout="constrained", squeeze=False
    )
    for column, (stage, stage_samples) in enumerate(samples.items()):
        memory, descriptors = axes[:, column]
        for rank in sorted({sample.rank for sample in stage_samples}):
            own = sorted((s for s in stage_samples if s.rank == rank), key=lambda sample: sample.step)
            settled = next(sample for sample in own if sample.step >= SETTLED_STEP)
            steps = [sample.step for sample in own]
            label = f"rank {rank}, {settled.resident / MIB:.0f} MiB"
            memory.plot(steps, [sample.resident / settled.resident - 1 for sample in own], label=label)
            descriptors.plot(steps, [sample.descriptors for sample in own], label=f"rank {rank}")
        memory.axhspan(
            -MEMORY_TOLERANCE, MEMORY_TOLERANCE, color="tab:green", alpha=0.12, label="asked for: within 1 %"
        )
        memory.axvline(SETTLED_STEP, color="gray", linestyle=":", linewidth=1)
        memory.set_ylim(-0.03, 0.03)
        memory.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        memory.set_title(f"{stage.upper()}: resident memory against step {SETTLED_STEP}")
        memory.legend(loc="lower right")
        descriptors.set_title("open file descriptors")
        descriptors.set_xlabel("step")
        descriptors.yaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (memory, descriptors):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
