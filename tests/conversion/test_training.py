"""A converted model is trained in a configuration of one line more, and what was learnt is exported from any layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_ogpsa.data import load_chat_tokenizer
from tests.conversion.conftest import Conversions, Outcome, convert
from tests.conversion.models import TRAINED
from tests.harness.preloaded import PreloadedCommand
from tests.integration.conftest import scalars

ROWS = [(f"say hello to {word}", f"hello to the {word}, good bye") for word in ("world", "lock", "capital", "France")]

# fp32 on both sides; sums of some hundred terms in another order.
TOLERANCE = 2e-5

CONFIG = """
model: {model}
seq-length: 128
micro-batch-size: 2
global-batch-size: 4
train-iters: 2
lr: 1.0e-2
lr-decay-style: constant
use-distributed-optimizer: true
ogpsa-train-data: {data}
ckpt-format: torch_dist
save: {save}
save-interval: 1
log-interval: 1
tensorboard-dir: {save}/log
{layout}
"""
LAYOUTS = {"trained-tp2": "tensor-model-parallel-size: 2", "trained-pp2": "pipeline-model-parallel-size: 2"}


@pytest.fixture(scope="module")
def trained(conversions: Conversions, preloaded: PreloadedCommand) -> dict[str, Outcome]:
    """Each model after two steps on the same four rows, its first checkpoint exported to ``NAME-exported``."""
    top = conversions.top
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    (top / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    for name in TRAINED:
        text = CONFIG.format(
            model=conversions.megatron(name), data=top / "chats.jsonl", save=top / f"{name}-run", layout=LAYOUTS[name]
        )
        (top / f"{name}.yaml").write_text(text, encoding="utf-8")
        finished = preloaded.run(
            "megatron_ogpsa.cli.main",
            ["train", "--nproc-per-node", "2", str(top / f"{name}.yaml")],
            folder=top,
            timeout=200,
        )
        assert finished.exit_code == 0, finished.output[-3000:]
    first = next(iter(TRAINED))
    shutil.copytree(top / f"{first}-run", top / "torn")
    file = sorted((top / "torn/iter_0000002").glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    (top / "empty").mkdir()
    lines = {
        **{name: (top / f"{name}-run", top / f"{name}-exported", "--ckpt-step", "1") for name in TRAINED},
        "bf16": (top / f"{first}-run", top / "bf16-exported", "--dtype", "bf16"),
        "torn": (top / "torn", top / "torn-exported"),
        "no-config": (top / f"{first}-run", top / "never", "--hf", top / "empty"),
        "other-model": (top / f"{first}-run", top / "never", "--hf", conversions.original("llama3.2")),
        "other-rope": (top / f"{first}-run", top / "never", "--hf", _without_rope_scaling(conversions.original(first))),
    }
    return dict(zip(lines, convert([*lines.values()]), strict=True))


def _without_rope_scaling(original: Path) -> Path:
    folder = original.with_name("other-rope")
    folder.mkdir()
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_of_an_exported_model_is_megatrons(
    conversions: Conversions, trained: dict[str, Outcome], name: str
) -> None:
    """The second step's loss, which Megatron logs before it changes the weights, is of the first checkpoint's weights."""
    assert trained[name].exit_code == 0, trained[name].output + trained[name].errors
    losses = scalars(conversions.top / f"{name}-run/log", "lm loss")["lm loss"]
    before, after = _loss(conversions.original(name)), _loss(conversions.top / f"{name}-exported")
    assert losses[1] == pytest.approx(before, rel=TOLERANCE)
    assert losses[2] == pytest.approx(after, rel=TOLERANCE)
    assert abs(before - after) > 0.01


def test_another_dtype_is_told_in_the_configuration(conversions: Conversions, trained: dict[str, Outcome]) -> None:
    assert trained["bf16"].exit_code == 0, trained["bf16"].errors
    folder = conversions.top / "bf16-exported"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_what_is_wrong_with_a_checkpoint_is_told(conversions: Conversions, trained: dict[str, Outcome]) -> None:
    assert "is not what integrity.json says" in trained["torn"].error
    assert "--ckpt-step 1" in trained["torn"].error
    assert "config.json is missing" in trained["no-config"].error
    assert "output_layer.weight is not part of the model" in trained["other-model"].error
    assert "--use-rope-scaling True, config.json means False" in trained["other-rope"].error
    assert not (conversions.top / "never").exists()


def _loss(folder: Path) -> float:
    """Mean over the answers' tokens of all rows, in transformers."""
    tokenizer = load_chat_tokenizer("HuggingFaceTokenizer", str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    losses: list[Tensor] = []
    for question, answer in ROWS:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        token_ids, is_answer = tokenizer.encode_chat(chat)
        tokens, mask = torch.tensor(token_ids), torch.tensor(is_answer)
        with torch.no_grad():
            log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, tokens[1:, None])[:, 0][mask[1:]])
    return torch.cat(losses).mean().item()
