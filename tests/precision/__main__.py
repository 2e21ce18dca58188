"""``python -m tests.precision``: what storing the basis in fewer digits loses; writes ``docs/memory.md`` and its data."""

from __future__ import annotations

import argparse
import datetime
import platform
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from megatron_ogpsa.system.files import write_json
from tests.precision.measuring import CASES, SIZES, STORAGES, all_measurements
from tests.precision.report import as_markdown, plot

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.precision")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where the page goes")
    args = parser.parse_args()
    measurements = tqdm(all_measurements(), total=2 * len(CASES) * len(STORAGES), desc="measuring")
    result = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": platform.machine(),
        "versions": {"torch": version("torch")},
        "sizes": list(SIZES),
        "measurements": list(measurements),
    }
    write_json(args.out / "basis_precision.json", result)
    plot(result, args.out / "basis_precision.png")
    (args.out / "memory.md").write_text(as_markdown(result), encoding="utf-8")


if __name__ == "__main__":
    main()
