"""A converted model is trained in a configuration of one line more, and what was learnt is exported."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_ogpsa.conversion.convert import to_hugging_face
from megatron_ogpsa.data import load_chat_tokenizer
from megatron_ogpsa.errors import UserError
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
tensor-model-parallel-size: 2
"""


@dataclass(frozen=True)
class Trained:
    """The model after two steps on four rows in TP2: ``run``, and what came of its exports, by name of the target."""

    run: Path
    exports: dict[str, Outcome]

    def folder(self, name: str) -> Path:
        return self.run.parent / name


@pytest.fixture(scope="module")
def trained(conversions: Conversions, preloaded: PreloadedCommand) -> Trained:
    top, original = conversions.top, conversions.original(TRAINED)
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    (top / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    run = top / "run"
    text = CONFIG.format(model=conversions.megatron(TRAINED), data=top / "chats.jsonl", save=run)
    (top / "run.yaml").write_text(text, encoding="utf-8")
    command = ["train", "--nproc-per-node", "2", str(top / "run.yaml")]
    finished = preloaded.run("megatron_ogpsa.cli.main", command, folder=top, timeout=200)
    assert finished.exit_code == 0, finished.output[-3000:]
    shutil.copytree(run, top / "torn")
    file = sorted((top / "torn/iter_0000002").glob("*.distcp"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    (top / "empty").mkdir()
    lines: dict[str, list[str | Path]] = {
        "exported": [run, "--ckpt-step", "1"],
        "bf16": [run, "--dtype", "bf16"],
        "torn-exported": [top / "torn"],
        "no-config": [run, "--hf", top / "empty"],
        "other-model": [run, "--hf", conversions.original("llama3.2")],
        "other-rope": [run, "--hf", _without_rope_scaling(original)],
    }
    outcomes = convert([(source, top / name, *flags) for name, (source, *flags) in lines.items()])
    return Trained(run, dict(zip(lines, outcomes, strict=True)))


def _without_rope_scaling(original: Path) -> Path:
    folder = original.with_name("without-rope-scaling")
    folder.mkdir()
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_loss_of_an_exported_model_is_megatrons(conversions: Conversions, trained: Trained) -> None:
    """The second step's loss, which Megatron logs before it changes the weights, is of the first checkpoint's weights."""
    assert trained.exports["exported"].exit_code == 0, trained.exports["exported"].errors
    losses = scalars(trained.run / "log", "lm loss")["lm loss"]
    before, after = _loss(conversions.original(TRAINED)), _loss(trained.folder("exported"))
    assert losses[1] == pytest.approx(before, rel=TOLERANCE)
    assert losses[2] == pytest.approx(after, rel=TOLERANCE)
    assert abs(before - after) > 0.01


def test_an_exported_model_stops_where_it_has_learnt_to(conversions: Conversions, trained: Trained) -> None:
    """Its configuration, of which the tokenizer knows nothing, ends generation at token 2 alone."""
    original, exported = conversions.original(TRAINED), trained.folder("exported")
    assert GenerationConfig.from_pretrained(exported).eos_token_id == [2, 3]
    assert AutoTokenizer.from_pretrained(exported).convert_ids_to_tokens(3) == "<|im_end|>"
    template = "chat_template.jinja"
    assert (exported / template).read_bytes() == (original / template).read_bytes()


def test_another_dtype_is_told_in_the_configuration(trained: Trained) -> None:
    assert trained.exports["bf16"].exit_code == 0, trained.exports["bf16"].errors
    folder = trained.folder("bf16")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_what_is_wrong_with_a_checkpoint_is_told(trained: Trained) -> None:
    errors = {name: outcome.error for name, outcome in trained.exports.items() if name not in ("exported", "bf16")}
    assert "is not what integrity.json says" in errors["torn-exported"]
    assert "--ckpt-step 1" in errors["torn-exported"]
    assert "config.json is missing" in errors["no-config"]
    assert "output_layer.weight is not part of the model" in errors["other-model"]
    assert "--use-rope-scaling True, config.json means False" in errors["other-rope"]
    assert not any(trained.folder(name).exists() for name in errors)


def test_without_the_carried_folder_another_one_must_be_named(conversions: Conversions, trained: Trained) -> None:
    carried = conversions.megatron(TRAINED) / "huggingface"
    aside = carried.rename(carried.with_name("aside"))
    try:
        with pytest.raises(UserError, match=rf"no config\.json in .*{carried}: name with --hf the Hugging Face folder"):
            to_hugging_face(trained.run, trained.folder("never"), most_bytes=1)
    finally:
        aside.rename(carried)


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
