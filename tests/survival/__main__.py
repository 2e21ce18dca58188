"""Kill runs many times over and keep the account: ``python -m tests.survival --kills 60 --json docs/kills.json``.

Half of the kills fall on SFT, half on DPO, a few on each chain of starts. A chain ends early if a start comes to its end
before its kill; then there are more chains. Ends with 0 if every start's figures and every last checkpoint were bitwise
those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import CONFIG, write_inputs
from tests.survival.kills import KILLED, MODULE, STAGES, Attempt, killed, undisturbed, write_pairs

KILLS_IN_A_CHAIN = 5


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="kills in all (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of the first chain; the next ones count on")
    parser.add_argument("--json", type=Path, help="file to write the account to")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    command = PreloadedCommand()
    chains: list[dict[str, object]] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ogpsa-kills-") as name:
        top = Path(name)
        write_inputs(top / "inputs")
        given = [
            "--tokenizer-model",
            str(top / "inputs/tokenizer"),
            "--ogpsa-train-data",
            str(top / "inputs/safety.jsonl"),
        ]
        given += ["--ogpsa-reference", f"general={top / 'inputs/general.jsonl'}"]

        def start(folder: Path, flags: tuple[str, ...], kill: str) -> tuple[int, str]:
            os.environ["KILL"] = kill
            own = [*given[:2], *(given[2:] if "--ogpsa-stage" not in flags else [])]
            done = command.run(MODULE, ["train", str(CONFIG), *own, *flags], folder=folder, timeout=300)
            if done.exit_code is None:
                raise AssertionError(f"still running after 300 s: {done.output[-2000:]}")
            return done.exit_code, done.output

        while (done := _num_kills(chains)) < args.kills:
            stage, number = ("sft", "dpo")[done >= args.kills / 2], len(chains)
            left = (args.kills + 1) // 2 - done if stage == "sft" else args.kills - done
            seed, whole, folder = args.seed + number, top / f"{stage}-whole", top / f"chain-{number}"
            folder.mkdir()
            write_pairs(folder)
            if not whole.exists():
                whole.mkdir()
                write_pairs(whole)
                figures = undisturbed(start, STAGES[stage], whole)
            generator, kills = random.Random(seed), min(KILLS_IN_A_CHAIN, left)
            attempts = killed(start, STAGES[stage], folder, whole, figures, generator, num_kills=kills)
            chains.append({"stage": stage, "seed": seed, "attempts": [asdict(attempt) for attempt in attempts]})
            _tell(stage, seed, attempts, chains, args.kills, time.monotonic() - started)
    command.close()
    account = {
        "kills": _num_kills(chains),
        "seconds": round(time.monotonic() - started),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        "date": time.strftime("%Y-%m-%d"),
        "chains": chains,
    }
    if args.json:
        args.json.write_text(json.dumps(account, indent=1) + "\n", encoding="utf-8")
    print(f"{account['kills']} kills, every start and every last checkpoint bitwise as undisturbed")


def _num_kills(chains: list[dict[str, object]]) -> int:
    return sum(attempt["exit_code"] == KILLED for chain in chains for attempt in chain["attempts"])  # type: ignore[attr-defined]


def _tell(
    stage: str, seed: int, attempts: list[Attempt], chains: list[dict[str, object]], wanted: int, seconds: float
) -> None:
    phases = Counter(attempt.kill.split()[0] for attempt in attempts if attempt.exit_code == KILLED)
    done = _num_kills(chains)
    left = seconds / max(done, 1) * (wanted - done)
    told = ", ".join(f"{count} in {phase}" for phase, count in sorted(phases.items()))
    print(f"{stage}, seed {seed}: {told}; bitwise. {done} of {wanted} kills, about {left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
