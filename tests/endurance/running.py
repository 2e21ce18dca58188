"""Run a small model for long, as users run it, and look at its ranks from outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from tqdm import tqdm

from tests.data.conftest import build_hugging_face_folder
from tests.endurance.judging import Sample

ROOT = Path(__file__).resolve().parents[2]
LOG_INTERVAL = 20
STEP = re.compile(r"iteration +(\d+)/ *\d+ \|")

STAGES = ("sft", "dpo")

MODEL = """
launch:
  nproc-per-node: 2
use-distributed-optimizer: true
num-layers: 2
hidden-size: 32
num-attention-heads: 2
swiglu: true
normalization: RMSNorm
disable-bias-linear: true
position-embedding-type: rope
seq-length: 64
max-position-embeddings: 64
tokenizer-type: HuggingFaceTokenizer
tokenizer-model: tokenizer
micro-batch-size: 2
global-batch-size: 4
lr: 1.0e-4
lr-decay-style: constant
hidden-dropout: 0.0
attention-dropout: 0.0
ogpsa-reference-samples: 8
ckpt-format: torch_dist
save-interval: 500
"""


def prepare(folder: Path) -> None:
    """The tokenizer, the data and the configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    build_hugging_face_folder(folder / "tokenizer")

    def write(name: str, rows: Iterator[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    write("sft.jsonl", ({"prompt": f"how do i build {i}", "response": "i will not help"} for i in range(200)))
    write("sft_general.jsonl", ({"prompt": f"what is {i} plus one", "response": f"{i + 1}"} for i in range(40)))
    write("dpo.jsonl", ({"prompt": f"how {i}", "chosen": "no, never", "rejected": "take it"} for i in range(200)))
    write("dpo_general.jsonl", ({"prompt": f"{i} + 1", "chosen": f"{i + 1}", "rejected": "?"} for i in range(40)))
    (folder / "config.yaml").write_text(MODEL, encoding="utf-8")


def flags_of(stage: str, steps: int) -> list[str]:
    """TP2 for SFT, DP2 for DPO; refreshed as often as by default. Only the last checkpoint is kept."""
    return [
        *("--ogpsa-stage", stage, "--ogpsa-train-data", f"{stage}.jsonl"),
        *("--ogpsa-reference", f"general={stage}_general.jsonl", "--save", f"out-{stage}"),
        *("--tensor-model-parallel-size", "2" if stage == "sft" else "1"),
        # A few more: the last step's line comes while the run is being taken down.
        *(
            "--train-iters",
            str(steps + LOG_INTERVAL),
            "--save-retain-interval",
            "1000000",
            "--log-interval",
            str(LOG_INTERVAL),
        ),
    ]


def run(stage: str, folder: Path, steps: int) -> list[Sample]:
    """Train, and look at each rank when it has logged a step.

    Raises:
        RuntimeError: training failed; with the last lines of its output.
    """
    command = [sys.executable, "-m", "megatron_ogpsa.cli.main", "train", "config.yaml", *flags_of(stage, steps)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    samples: list[Sample] = []
    lines: list[str] = []
    open_before: dict[int, set[tuple[str, str]]] = {}
    with (
        subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as launcher,
        tqdm(total=steps, desc=stage, unit=" steps") as bar,
    ):
        assert launcher.stdout is not None
        for line in launcher.stdout:
            lines.append(line)
            if (found := STEP.search(line)) and int(found[1]) <= steps:
                step = int(found[1])
                for rank, process in ranks_of(launcher.pid).items():
                    samples.append(sample_of(rank, process, step, open_before))
                bar.update(step - bar.n)
    (folder / f"{stage}.log").write_text("".join(lines), encoding="utf-8")
    if launcher.returncode != 0:
        raise RuntimeError(f"{stage} ended with {launcher.returncode}:\n{''.join(lines[-30:])}")
    return samples


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """The launcher's processes that are ranks."""
    processes = psutil.Process(launcher).children()
    return {int(process.environ()["RANK"]): process for process in processes if "RANK" in process.environ()}


def sample_of(rank: int, process: psutil.Process, step: int, open_before: dict[int, set[tuple[str, str]]]) -> Sample:
    """The rank as it is now; what it has open takes the place of its ``open_before``."""
    memory, now_open = process.memory_full_info(), open_descriptors(process.pid)
    held = now_open & open_before.get(rank, now_open)
    open_before[rank] = now_open
    passing = tuple(sorted(target for _, target in now_open - held))
    return Sample(rank, step, memory.rss, memory.uss, len(held), passing)


def open_descriptors(pid: int) -> set[tuple[str, str]]:
    """Number and target of each open descriptor; those that close while they are read are not."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add((entry.name, os.readlink(entry)))
    return found
