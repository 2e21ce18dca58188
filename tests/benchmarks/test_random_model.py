"""The model of random weights that speed is measured with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_ogpsa.benchmarks import random_model
from tests.data.conftest import build_hugging_face_folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    folder = tmp_path / "tokenizer"
    build_hugging_face_folder(folder)
    return folder


def test_it_is_a_model_with_that_tokenizer(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "model"
    flags = ["--tokenizer", str(tokenizer), "--layers", "2", "--hidden-size", "256"]
    assert random_model.main([str(folder), *flags]) == 0
    model, copied = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), AutoTokenizer.from_pretrained(folder)
    ids = copied.apply_chat_template([{"role": "user", "content": "what is 1 plus one"}], return_dict=False)
    assert ids == AutoTokenizer.from_pretrained(tokenizer).apply_chat_template(
        [{"role": "user", "content": "what is 1 plus one"}], return_dict=False
    )
    assert model.dtype == torch.bfloat16
    logits = model(torch.tensor([ids])).logits
    assert logits.shape == (1, len(ids), len(copied))
    assert logits.isfinite().all()
    vocabulary, width = len(copied), 256
    layer = width * (2 * width + 2 * 64) + 3 * 4 * width * width + 2 * width
    assert capsys.readouterr().out.endswith(f": {vocabulary * width + 2 * layer + width:,} parameters\n")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--hidden-size", "300"), "--hidden-size 300: use a multiple of 256"),
        (("--layers", "0"), "--layers 0: use 1 or more"),
        (("--tokenizer", "nowhere"), "--tokenizer nowhere: "),
    ],
)
def test_what_it_cannot_make_is_refused(
    flags: tuple[str, ...], said: str, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert random_model.main([str(tmp_path / "model"), "--tokenizer", str(tokenizer), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
