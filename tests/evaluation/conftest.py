"""A run's checkpoints, data and judges, and a way to score them as users do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import CONFIG, Outcome, write_inputs

ONE = "--nproc-per-node 1 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1"
LAYOUTS = {
    "tp2": "--nproc-per-node 2 --pipeline-model-parallel-size 1 --make-vocab-size-divisible-by 64",
    "pp2": "--nproc-per-node 2 --tensor-model-parallel-size 1",
    "dp2": "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1",
}
NUM_SAMPLES = 22
"""Of which 21 and 13 are scored besides: no multiples of data-parallel ranks × micro-batch (2 × 2)."""

Evaluate = Callable[..., Outcome]


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory, preloaded: PreloadedCommand) -> Path:
    """Data, and checkpoints of 3 steps in ``run``; training has said its loss on ``general`` by Megatron's own validation."""
    folder = write_inputs(tmp_path_factory.mktemp("evaluate"))
    rows = [json.loads(line) for line in (folder / "safety.jsonl").read_text(encoding="utf-8").splitlines()]
    general = (folder / "general.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "valid.jsonl").write_text("".join(general[:NUM_SAMPLES]), encoding="utf-8")
    (folder / "odd.jsonl").write_text("".join(general[:21]), encoding="utf-8")
    pairs = [
        {"prompt": q["content"], "chosen": a["content"], "rejected": "it is 7"}
        for q, a in (r["messages"] for r in rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[:13]), encoding="utf-8")
    prompts = [{"prompt": "how do i build " + "weapon " * number} for number in range(1, 8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts), encoding="utf-8")
    (folder / "judge.py").write_text("def judge(prompt, answer): return len(prompt) % 2 == 0\n", encoding="utf-8")
    (folder / "slow_judge.py").write_text("import time\ndef judge(prompt, answer): time.sleep(60)\n", encoding="utf-8")
    (folder / "bad_judge.py").write_text("def judge(prompt, answer): return 1 / 0\n", encoding="utf-8")
    flags = (
        f"{ONE} --tokenizer-model tokenizer --ogpsa-train-data safety.jsonl --ogpsa-valid-data valid.jsonl --save run"
    )
    finished = preloaded.run(
        "megatron_ogpsa.cli.main",
        ["train", str(CONFIG), *flags.split(), *"--ogpsa-reference general=general.jsonl".split()],
        folder=folder,
        timeout=200,
    )
    assert finished.exit_code == 0, finished.output[-3000:]
    (folder / "train.log").write_text(finished.output, encoding="utf-8")
    return folder


@pytest.fixture
def evaluate(folder: Path, preloaded: PreloadedCommand) -> Evaluate:
    def run(*flags: str, load: str = "run") -> Outcome:
        given = ["evaluate", str(CONFIG), "--tokenizer-model", "tokenizer", "--load", load]
        finished = preloaded.run("megatron_ogpsa.cli.main", [*given, *flags], folder=folder, timeout=200)
        assert finished.exit_code is not None, finished.output[-3000:]
        return Outcome(finished.exit_code, finished.output, folder)

    return run
