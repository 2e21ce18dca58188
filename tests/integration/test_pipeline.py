"""SFT→DPO as one job: killed in each phase it ends with the weights of an undisturbed run; what is finished is skipped."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.demo.benchmark import BenchmarkSpec, write_benchmark
from tests.harness.preloaded import PreloadedCommand, Running
from tests.integration.checkpoints import checkpoint_tensors
from tests.integration.conftest import GENERAL, REFERENCE_SAMPLES, ROOT, Train

CONFIG = ROOT / "configs/example/sft-dpo.yaml"
GENERAL_PAIRS = GENERAL.with_name("general_preference.jsonl")
DP2 = "--nproc-per-node 2 --tensor-model-parallel-size 1 --pipeline-model-parallel-size 1".split()


def pipeline_text(inputs: Path, folder: Path) -> str:
    """The example with the demo's safety data, a little general data as references, and fewer, larger micro-batches."""
    benchmark = write_benchmark(folder / "data", BenchmarkSpec(base_train=70, safety_train=100, eval_per_task=4))
    text = CONFIG.read_text(encoding="utf-8")
    general, pairs = inputs / "general.jsonl", benchmark.safety_pairs
    for name, path in (
        ("data/tokenizer", inputs / "tokenizer"),
        ("data/safety.jsonl", benchmark.safety_train),
        ("data/safety_pairs.jsonl", benchmark.safety_pairs),
        ("data/general.jsonl", GENERAL if GENERAL.exists() else general),
        ("data/general_pairs.jsonl", GENERAL_PAIRS if GENERAL_PAIRS.exists() else pairs),
    ):
        assert text.count(name) == 1, name
        text = text.replace(name, str(path))
    assert text.count("micro-batch-size: 1") == 1
    assert text.count("reference-samples: 32") == 1
    text = text.replace("reference-samples: 32", f"reference-samples: {REFERENCE_SAMPLES}")
    return text.replace("micro-batch-size: 1", "micro-batch-size: 2")


@pytest.fixture
def pipeline(inputs: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(pipeline_text(inputs, tmp_path), encoding="utf-8")
    return path


@pytest.fixture
def job(preloaded: PreloadedCommand, pipeline: Path) -> Callable[..., Running]:
    """``job(*flags, num_ranks=...)``: start the pipeline as one torchrun job, whose ranks start a process for each stage."""

    def start(*flags: str, num_ranks: int) -> Running:
        arguments = ["--standalone", f"--nproc-per-node={num_ranks}", "-m", "megatron_ogpsa.cli.main", "train"]
        return preloaded.start(
            "torch.distributed.run",
            [*arguments, str(pipeline), *flags],
            folder=pipeline.parent,
            output=pipeline.parent / f"job-{next(numbers)}.log",
            agent=True,
        )

    numbers = itertools.count()
    return start


def finished(job: Running) -> str:
    """The output of a job that is to end well."""
    code = job.wait(timeout=400)
    job.kill()
    assert code == 0, job.output[-4000:]
    return job.output


def test_killed_in_each_phase_it_ends_as_if_undisturbed(
    train: Train, pipeline: Path, job: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP2×PP2. The undisturbed run is one torchrun job, the others are launches of their own for each stage.

    (That torchrun ends a job of which a rank was killed is shown below.)
    """
    output = finished(job("--save", "whole", num_ranks=4))
    assert output.index("stage sft (whole/sft) begins") < output.index("stage dpo (whole/dpo) begins")

    for die, expected in (
        ("sft step 4", ["sft (killed/sft) begins"]),
        ("dpo policy 1", ["sft (killed/sft) goes on", "dpo (killed/dpo) begins"]),
        ("dpo step 4", ["sft (killed/sft) is finished: skipped", "dpo (killed/dpo) begins"]),
    ):
        monkeypatch.setenv("DIE", die)
        outcome = train("--save", "killed", config=pipeline, module="tests.integration.dying", plain=True, timeout=400)
        assert outcome.exit_code != 0, outcome.output[-3000:]
        assert "rank 1 ended with signal 9" in outcome.output, outcome.output[-3000:]
        for line in expected:
            assert line in outcome.output
    assert "DPO: 64 of 100 reference log-probabilities are there" in outcome.output
    monkeypatch.delenv("DIE")
    # An exit condition that comes true in the last step, as a time limit may: the stage is finished all the same.
    outcome = train("--save", "killed", "--exit-interval", "6", config=pipeline, plain=True, timeout=400)
    assert outcome.exit_code == 0, outcome.output[-3000:]
    assert "dpo (killed/dpo) goes on" in outcome.output
    assert "exiting program at iteration 6" in outcome.output
    assert "has stopped before its last step" not in outcome.output

    for stage in ("sft", "dpo"):
        undisturbed = checkpoint_tensors(pipeline.parent / "whole" / stage)
        killed = checkpoint_tensors(pipeline.parent / "killed" / stage)
        assert undisturbed.keys() == killed.keys()
        assert any("exp_avg" in name for name in killed)
        for name, tensor in undisturbed.items():
            assert torch.equal(tensor, killed[name]), f"{stage}: {name}"


def test_finished_stages_are_skipped_and_a_lost_job_leaves_no_process(
    pipeline: Path, job: Callable[..., Running]
) -> None:
    """Two ranks. A rank of the job is killed while a stage runs in a process of its own, which must not live on."""
    flags = [*DP2[2:], "--save", "out"]
    lost = job(*flags, num_ranks=2)
    deadline = time.monotonic() + 120
    while "iteration        1/" not in lost.output:
        assert lost.wait(0.05) is None, lost.output[-4000:]
        assert time.monotonic() < deadline, lost.output[-4000:]
    ranks = children(lost.pid)
    stage_processes = [grandchild for rank in ranks for grandchild in children(rank)]
    assert len(ranks) == len(stage_processes) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert lost.wait(timeout=60) not in (0, None), lost.output[-4000:]
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in stage_processes):
        assert time.monotonic() < deadline, "a stage's process outlived its rank"
        time.sleep(0.1)

    shutil.rmtree(pipeline.parent / "out")
    finished(job(*flags, "--stage", "sft", num_ranks=2))
    assert not (pipeline.parent / "out/dpo").exists()
    output = finished(job(*flags, "--lr-warmup-iters", "1", num_ranks=2))
    assert "stage sft (out/sft) is finished: skipped; changed since: lr-warmup-iters; delete the folder" in output
    assert "stage dpo (out/dpo) begins" in output
    assert output.count("stage sft") == 1  # rank 0 alone speaks


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("ogpsa-dpo-beta: a lot", "ogpsa-dpo-beta: invalid float value: 'a lot'"),
        (
            "skip-train: true",
            "--skip-train with --ogpsa-stage dpo is not supported: the reference policy is known after",
        ),
    ],
)
def test_a_mistake_in_the_last_stage_is_told_before_the_first_one_trains(
    train: Train, pipeline: Path, mistake: str, told: str
) -> None:
    text = pipeline.read_text(encoding="utf-8")
    pipeline.write_text(text.replace("ogpsa-dpo-beta: 0.2", mistake), encoding="utf-8")
    outcome = train(*DP2, config=pipeline, plain=True)
    assert outcome.exit_code == 2, outcome.output[-3000:]
    assert len(outcome.error_lines) == 1, outcome.error_lines
    assert told in outcome.error_lines[0]
    assert "iteration" not in outcome.output


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
