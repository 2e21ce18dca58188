"""``python -m tests.endurance``: 2,000 steps of SFT and of DPO; writes ``docs/endurance.{md,json,png}`` and judges.

Exits with 1 if memory is not flat or descriptors are not constant.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ogpsa.system.files import write_json
from tests.endurance import running
from tests.endurance.judging import Sample, judge
from tests.endurance.report import as_markdown, plot


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.endurance")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=running.ROOT / "docs", help="where the report goes")
    args = parser.parse_args()
    samples: dict[str, list[Sample]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        running.prepare(Path(folder))
        for stage in running.STAGES:
            started = time.monotonic()
            samples[stage] = running.run(stage, Path(folder), args.steps)
            seconds[stage] = time.monotonic() - started
    result = described(samples, seconds, args.steps)
    write_json(args.out / "endurance.json", result)
    plot(samples, args.out / "endurance.png")
    text = as_markdown(result)
    (args.out / "endurance.md").write_text(text, encoding="utf-8")
    print(text)
    verdicts = [verdict for stage in samples.values() for verdict in judge(stage)]
    return 0 if all(verdict.is_flat and verdict.holds_descriptors for verdict in verdicts) else 1


def described(samples: dict[str, list[Sample]], seconds: dict[str, float], steps: int) -> dict[str, Any]:
    """Everything that the report says, as JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "steps": steps,
        "stages": {
            stage: {
                "seconds": round(seconds[stage], 1),
                "flags": running.flags_of(stage, steps),
                "verdicts": [vars(verdict) for verdict in judge(stage_samples)],
                "samples": [vars(sample) for sample in stage_samples],
            }
            for stage, stage_samples in samples.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
