"""The processes of a run: conversion, training and scores of each setting and seed, and the way back."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_ogpsa.console.commands import Command
from megatron_ogpsa.laptop.recipe import Recipe
from megatron_ogpsa.references.steps import early_refreshes
from megatron_ogpsa.study.settings import Setting
from megatron_ogpsa.system.files import write_json

COMMAND = [sys.executable, "-m", "megatron_ogpsa.cli.main"]

ONE_NODE = ("--nnodes", "1")
"""Whatever NNODES or SLURM say of the machine that this runs on."""

MAX_NEW_TOKENS = 12
"""Of an answer whose opening says whether it is a refusal."""

SECONDS = {"start": 40.0, "sft": 5.0, "dpo": 10.0, "reference": 0.7, "score": 25.0, "chat": 15.0}
"""Of starting a job, a step of each stage, the gradient of one reference, scoring a checkpoint, and one model's answers."""


@dataclass(frozen=True)
class Job:
    """One setting with one seed.

    Attributes:
        title: what progress and logs call it.
        config: the file that trains it.
        is_done: whether an earlier run has scored it with the same file.
    """

    recipe: Recipe
    name: str
    setting: Setting
    config: Path
    is_done: bool

    @classmethod
    def of(cls, recipe: Recipe, name: str, setting: Setting) -> Job:
        """Write the configuration; what was trained with another one is removed.

        Raises:
            OSError: the folder cannot be written.
        """
        config = recipe.write_config(name, setting)
        job = cls(recipe, name, setting, config, False)
        if job.result.exists() and job.trained_with.exists() and job.trained_with.read_bytes() == config.read_bytes():
            return replace(job, is_done=True)
        for folder in (recipe.training(name), recipe.exported(name)):
            shutil.rmtree(folder, ignore_errors=True)
        job.result.unlink(missing_ok=True)
        return job

    @property
    def title(self) -> str:
        return f"seed {self.recipe.seed}, {self.setting.title}"

    @property
    def result(self) -> Path:
        """Scores of its checkpoints in the order of steps, as ``megatron-ogpsa evaluate`` writes them."""
        return self.recipe.folder / f"{self.name}.scores.json"

    @property
    def trained_with(self) -> Path:
        """A copy of the configuration, which stands for what was done with it."""
        return self.result.with_suffix(".trained.yaml")

    def steps(self) -> Iterator[Command]:
        """Training, the scores of its checkpoints, and the removal of all but the last of them."""
        sizes, training = self.recipe.sizes, self.recipe.training(self.name)
        scored = list(sizes.steps())
        seconds = 2 * SECONDS["start"] + sizes.sft_steps * SECONDS["sft"] + sizes.dpo_steps * SECONDS["dpo"]
        if self.setting.projected:
            steps = sizes.sft_steps + sizes.dpo_steps
            refreshes = max(len(scored) + 1, steps // sizes.refresh_interval)
            first = early_refreshes(sizes.refresh_interval, early=sizes.early_refreshes, warmup=sizes.refresh_warmup)
            refreshes += 2 * len(first)  # in either stage
            seconds += refreshes * sizes.references * SECONDS["reference"]
        log = self.recipe.folder / f"{self.name}.log"
        yield Command(self.title, [*COMMAND, "train", *ONE_NODE, str(self.config)], log, seconds, self.is_done)
        evaluate = [*_scoring(self, training / "dpo"), *_scored(self.recipe)]
        for stage, step in scored[:-1]:
            evaluate += ["--compare", f"{training / stage}@{step}"]
        yield Command(
            f"{self.title}: scores",
            [*evaluate, *_written(self.result)],
            self.result.with_suffix(".log"),
            SECONDS["start"] + SECONDS["score"] * len(scored),
            self.is_done,
            (self.config, self.trained_with),
        )
        left = [training / stage / f"iter_{step:07d}" for stage, step in scored[:-1]]
        is_tidy = self.is_done and not any(folder.exists() for folder in left)
        remove = ["rm", "-rf", *map(str, left)]
        yield Command(f"{self.title}: tidying", remove, log.with_suffix(".tidy.log"), 1.0, is_tidy)


def starting_steps(job: Job, model: Path) -> Iterator[Command]:
    """The model in Megatron's format, and its scores, in the configuration of any job."""
    recipe = job.recipe
    result = start_result(recipe)
    yield Command(
        "to Megatron",
        [*COMMAND, "convert", str(model), str(recipe.start)],
        recipe.out / "to-megatron.log",
        SECONDS["start"],
        (recipe.start / "latest_checkpointed_iteration.txt").exists(),
    )
    yield Command(
        "scores of the model as it came",
        [*_scoring(job, recipe.start), *_scored(recipe), *_written(result)],
        result.with_suffix(".log"),
        SECONDS["start"] + SECONDS["score"],
        result.exists(),
    )


def start_result(recipe: Recipe) -> Path:
    """Scores of the model as it came: the same for all settings and seeds, but not for numbers of other kinds."""
    return recipe.out / f"start.{recipe.sizes.seq_length}-{'bf16' if recipe.sizes.bf16 else 'fp32'}.scores.json"


def chatting_steps(jobs: Sequence[Job], model: Path, log: Path) -> Iterator[Command]:
    """Each job's model as a Hugging Face folder, and the answers of all, the model as it came first.

    Answers are there if the last chat ended well and was with models of the same names and configurations.

    Raises:
        OSError: the log's folder cannot be written.
    """
    asked, answered = log.with_suffix(".asked.json"), log.with_suffix(".answered.json")
    write_json(asked, {job.name: job.config.read_text(encoding="utf-8") for job in jobs})
    has_answers = answered.exists() and answered.read_bytes() == asked.read_bytes()
    is_done = has_answers and log.exists() and all(job.is_done for job in jobs)
    if not is_done:
        answered.unlink(missing_ok=True)
    for job in jobs:
        tuned, exported = job.recipe.training(job.name) / "dpo", job.recipe.exported(job.name)
        yield Command(
            f"{job.title}: back to Hugging Face",
            [*COMMAND, "convert", str(tuned), str(exported), "--hf", str(model), "--dtype", "fp32"],
            job.recipe.folder / f"{job.name}.to-huggingface.log",
            SECONDS["start"],
            (exported / "config.json").exists(),
        )
    folders = [str(model), *(str(job.recipe.exported(job.name)) for job in jobs)]
    yield Command(
        "chat",
        [sys.executable, "-m", "megatron_ogpsa.laptop.chat", *folders],
        log,
        SECONDS["chat"] * len(folders),
        is_done,
        (asked, answered),
    )


def _scoring(job: Job, folder: Path) -> list[str]:
    return [*COMMAND, "evaluate", str(job.config), *ONE_NODE, "--load", str(folder)]


def _scored(recipe: Recipe) -> list[str]:
    flags = ["--max-new-tokens", str(MAX_NEW_TOKENS)]
    for name, file in (("general", "general"), ("protected", "references")):
        flags += ["--data", f"{name}={recipe.data / file}.jsonl"]
    for name in ("unsafe", "benign"):
        flags += ["--prompts", f"{name}={recipe.data / name}.jsonl"]
    return flags


def _written(result: Path) -> list[str]:
    return ["--json", str(result), "--answers", str(result.with_suffix(".answers.jsonl"))]
