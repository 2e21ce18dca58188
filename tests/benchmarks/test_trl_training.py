"""TRL's trainers with the authors' rule, on a tiny model: what is counted, refreshed and projected. Nothing is timed here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ogpsa.benchmarks import trl_training
from megatron_ogpsa.benchmarks.speeds import read_trl_speed
from tests.conversion.models import build_chat_model

CPU = torch.device("cpu")


class Linear(torch.nn.Module):
    """A loss of weights·x; called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(3))
        self.loss = torch.tensor(0.0)

    def forward(self, input_ids: torch.Tensor) -> Linear:
        self.loss = (self.weights * input_ids).sum()
        return self


def test_references_are_computed_without_the_hooks_and_removed_from_each_micro_batch() -> None:
    model = Linear()
    clock = trl_training.Clock(
        CPU, [{"input_ids": torch.tensor([2.0, 0, 0])}, {"input_ids": torch.tensor([0, 2.0, 0])}], 2
    )
    for step in range(3):
        clock.begin(model)
        for _ in range(2):
            clock.count(torch.tensor([[1, 1, 0], [1, 1, 1]]))
            model(torch.tensor([5.0, 1.0, 7.0])).loss.backward()
        clock.end()
        assert model.weights.grad is not None
        expected = 2 * torch.tensor([2.0, -2.0, 7.0])  # (1, 1, 0)/√2 is the reference, of each of the two
        torch.testing.assert_close(model.weights.grad, expected)
        model.zero_grad()
        assert (clock.steps[step].tokens, clock.steps[step].positions) == (10, 12)
        assert bool(clock.steps[step].refresh_seconds) == (step in (0, 2))


def test_a_plain_clock_leaves_gradients_alone() -> None:
    model, clock = Linear(), trl_training.Clock(CPU, [], 2)
    clock.begin(model)
    model(torch.tensor([5.0, 1.0, 7.0])).loss.backward()
    clock.end()
    assert model.weights.grad is not None
    assert model.weights.grad.tolist() == [5.0, 1.0, 7.0]
    assert clock.steps[0].refresh_seconds == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trl")
    build_chat_model(folder / "tiny")

    def say(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    questions = [say("user", f"what is {number} plus one" + " please" * (number % 3)) for number in range(12)]
    conversations = [{"messages": question + say("assistant", "it is more")} for question in questions]
    pairs = [
        {"prompt": question, "chosen": say("assistant", "it is more"), "rejected": say("assistant", "no")}
        for question in questions
    ]
    for name, rows in (("sft", conversations), ("dpo", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_trainer_tells_its_steps(stage: str, folder: Path) -> None:
    account = folder / f"{stage}.json"
    flags = f"tiny --stage {stage} --rule authors --data {stage}.jsonl --reference sft.jsonl --json {account}"
    sizes = "--steps 5 --tokens-per-step 80 --micro-batch-size 2 --seq-length 64 --refresh-interval 2 --threads 1"
    command = [sys.executable, "-m", trl_training.__name__, *flags.split(), *sizes.split()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = json.loads(account.read_text(encoding="utf-8"))["steps"]
    assert [step["refresh_seconds"] > 0 for step in steps] == [True, False, True, False, True]
    assert all(0 < step["tokens"] <= step["positions"] for step in steps)
    assert any(step["tokens"] < step["positions"] for step in steps)  # samples differ in length
    assert 40 < sum(step["tokens"] for step in steps) / len(steps) < 160  # about what was asked for
    speed = read_trl_speed(account, [1, 3, 5])
    assert speed.tokens == steps[3]["tokens"]  # the fourth alone is neither among the first nor with a refresh
    assert speed.step_seconds == steps[3]["seconds"]
    assert speed.refresh_seconds == steps[4]["refresh_seconds"]
    assert speed.useful == steps[3]["tokens"] / steps[3]["positions"]


def test_mistakes_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "texts.jsonl").write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8")
    flags = [str(folder / "tiny"), "--stage", "sft", "--json", str(folder / "told.json"), "--rule", "authors"]
    good, texts, none = (str(folder / f"{name}.jsonl") for name in ("sft", "texts", "none"))
    assert trl_training.main([*flags, "--data", texts, "--reference", good]) == 2
    assert "texts.jsonl:1: TRL is given lists of messages in messages" in capsys.readouterr().err
    assert trl_training.main([*flags, "--data", good, "--reference", none]) == 2
    assert "no such file" in capsys.readouterr().err
    flags[0] = str(folder / "nowhere")
    assert trl_training.main([*flags, "--data", good, "--reference", good]) == 2
    assert "nowhere: no config.json in it" in capsys.readouterr().err
