"""A checkpoint of any layout is exported to what it was made of; and what ``docs/conversion.md`` prints is run."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.configuration.config_file import ConfigFile
from tests.conversion.conftest import Conversions, Outcome, run
from tests.conversion.models import SHAPE
from tests.conversion.test_families import weights
from tests.harness import WorkerGroup

TEXT = (Path(__file__).parents[2] / "docs/conversion.md").read_text(encoding="utf-8")
LAYOUTS = {
    "tp2": ("qwen2.5", {"tp": 2}),  # its vocabulary has three rows more there
    "pp2": ("qwen2.5-tied", {"pp": 2}),  # the last stage has a copy of the embedding
    "ep2": ("mixtral", {"ep": 2}),
    "each-layer": ("qwen3-moe", {"pp": 2, "each_layer": True}),
}
PLAN = """
model: {model}
ogpsa-train-data: train.jsonl
ogpsa-reference: {{helpful: helpful.jsonl}}
seq-length: 64
micro-batch-size: 1
global-batch-size: 8
train-iters: 1
lr: 1.0e-6
"""


@dataclass(frozen=True)
class Ran:
    """All commands, run in one process in ``folder``: exports by layout, those of the page by line, and two more."""

    folder: Path
    exports: dict[str, Outcome]
    page: dict[str, Outcome]
    without_config: Outcome
    plan: Outcome


def blocks(language: str) -> list[str]:
    """Of the page, in their order."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def ran(
    distributed: Callable[[int], WorkerGroup], conversions: Conversions, tmp_path_factory: pytest.TempPathFactory
) -> Ran:
    folder = tmp_path_factory.mktemp("layouts")
    for layout, (name, sizes) in LAYOUTS.items():
        folders = {layout: str(conversions.megatron(name))}
        distributed(2).run("tests.conversion.cases:saved", folders=folders, target=str(folder), **sizes)
    exports: dict[str, list[str | Path]] = {
        layout: ["convert", layout, f"{layout}-back", "--ckpt-step", "1", "--hf", conversions.original(name)]
        for layout, (name, _) in LAYOUTS.items()
    }
    _lay_out_the_page(folder, conversions)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    page = {line: shlex.split(line.partition("megatron-ogpsa ")[2], comments=True) for line in lines}
    (folder / "plan.yaml").write_text(PLAN.format(model=conversions.megatron("qwen2.5")), encoding="utf-8")
    others = (["convert", "tp2", "never", "--ckpt-step", "1"], ["plan", "plan.yaml", "--json"])
    outcomes = run([*exports.values(), *page.values(), *others], folder)
    of_exports, of_page = outcomes[: len(exports)], outcomes[len(exports) : -len(others)]
    return Ran(
        folder,
        dict(zip(exports, of_exports, strict=True)),
        dict(zip(page, of_page, strict=True)),
        *outcomes[-len(others) :],
    )


def _lay_out_the_page(folder: Path, conversions: Conversions) -> None:
    """Tiny models where the page has large ones."""
    shutil.copytree(conversions.original("qwen2.5"), folder / "models/qwen2.5-7b")
    shutil.copytree(conversions.original("qwen2.5"), folder / "runs/sft/huggingface")
    shutil.copytree(folder / "tp2/iter_0000001", folder / "runs/sft/iter_0000200")
    (making,) = blocks("python")
    with chdir(folder):
        exec(re.sub(r"(\w+)=\d+", lambda given: f"{given[1]}={SHAPE[given[1]]}", making), {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_leaves_no_trace(conversions: Conversions, ran: Ran, layout: str) -> None:
    assert ran.exports[layout].exit_code == 0, ran.exports[layout].errors
    before, after = weights(conversions.original(LAYOUTS[layout][0])), weights(ran.folder / f"{layout}-back")
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].shape == after[name].shape, name
        assert torch.equal(before[name], after[name]), name


def test_a_checkpoint_that_knows_no_configuration_needs_one(ran: Ran) -> None:
    assert "tp2: there is no config.json in its huggingface folder: name with --hf" in ran.without_config.error
    assert not (ran.folder / "never").exists()


def test_the_commands_of_the_page_run(ran: Ran) -> None:
    for line, outcome in ran.page.items():
        assert outcome.exit_code == 0, line + outcome.errors
    for original, back in (("models/qwen2.5-7b", "models/qwen2.5-7b-safe"), ("models/random", "models/random-back")):
        before, after = weights(ran.folder / original), weights(ran.folder / back)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), original


def test_the_configuration_of_the_page_takes_the_converted_model(ran: Ran) -> None:
    (text,) = blocks("yaml")
    (ran.folder / "page.yaml").write_text(text, encoding="utf-8")
    with chdir(ran.folder):
        values = {entry.key: entry.value for entry in ConfigFile.read(Path("page.yaml")).entries}
        assert (Path(values["pretrained-checkpoint"]) / "release/metadata.json").is_file()
        assert (Path(values["tokenizer-model"]) / "config.json").is_file()
    assert values["num-layers"] == "2"


def test_a_configuration_with_a_model_can_be_planned(conversions: Conversions, ran: Ran) -> None:
    assert ran.plan.exit_code == 0, ran.plan.errors
    elements = sum(value.numel() for value in weights(conversions.original("qwen2.5")).values())
    assert json.loads(ran.plan.output)["elements"] == elements
