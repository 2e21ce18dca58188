"""docs/refused.md: every refusal that stands in a table. ``python -m tests.adoption.refused_page`` writes it anew."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from megatron_ogpsa.refusal import Refusal

PAGE = Path(__file__).parents[2] / "docs/refused.md"

_HEAD = """# Refused at start

What is asked for and cannot be is refused before anything is built, by the flag's name, with what works instead; flags of a
pipeline's later stages too. A loop of one's own hears the same from `attach`, and Megatron-Bridge by the names that it has.
`python -m tests.adoption.refused_page` writes this page. Single values that are wrong, missing files and data are told too.
"""


def tables() -> dict[str, tuple[Refusal, ...]]:
    """Where it is refused → what."""
    from megatron_ogpsa.integration.arguments import cpu, loop, packing, projection, stage
    from megatron_ogpsa.integration.checkpoints.loaded_model import IN_SCORING
    from megatron_ogpsa.integration.inputs import context_parallel
    from megatron_ogpsa.integration.projection import authors, schedule
    from megatron_ogpsa.planning.arguments import UNPLANNED
    from megatron_ogpsa.plugin import limits
    from megatron_ogpsa.precision.fp8_support import IN_FP8
    from megatron_ogpsa.references.limits import PASSES

    return {
        "With references": (
            *projection.FLAGS,
            *PASSES,
            *limits.WRAPPERS,
            *limits.MODELS,
            *limits.OPTIMIZERS,
        ),
        "With references, where updates are projected (the default)": (
            *limits.OPTIMIZERS_OF_UPDATES,
            *limits.MODELS_OF_UPDATES,
            limits.SKIPPED_STEPS,
        ),
        "With references, of schedules": schedule.WITH_SCHEDULES,
        "With references, in FP8": IN_FP8,
        "With `--ogpsa-authors-rule`": authors.NOT_THEIRS,
        "With `--ogpsa-authors-leak`": authors.NOT_THE_LEAKS,
        "By `megatron-ogpsa train`": loop.IN_THE_LOOP,
        "In DPO": stage.IN_DPO,
        "With rows of several documents (`--ogpsa-packing`, pairs)": packing.PACKED,
        "With sequences split over ranks": (*context_parallel.SPLIT, context_parallel.LOCAL_ATTENTION),
        "Without a GPU": (*cpu.WITHOUT_GPU, *cpu.TRAINING_WITHOUT_GPU),
        "By `megatron-ogpsa evaluate`": IN_SCORING,
        "By `megatron-ogpsa plan`": UNPLANNED,
    }


def page() -> str:
    """The page's text, of the tables as they are; values are an ellipsis."""
    return _HEAD + "".join(
        "\n".join([f"\n## {where}\n", "| | why | instead |", "|---|---|---|", *_rows(table)]) + "\n"
        for where, table in tables().items()
    )


def _rows(table: Iterable[Refusal]) -> list[str]:
    return [f"| `{_shown(refusal.flag)}` | {_shown(refusal.reason)} | {refusal.remedy} |" for refusal in table]


def _shown(text: str) -> str:
    text = re.sub(r"\{0\.packs\}", "packing", text)
    return re.sub(r"\{[^}]*\}", "…", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
