"""Tokenizers small enough to be built for each run of the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_ogpsa.data import ChatTokenizer, load_chat_tokenizer

settings.register_profile("any machine", settings(), deadline=None)  # of 0.2 s for each example
settings.load_profile("any machine")

TEXT = [
    "What is the capital of France? Paris is the capital of France.",
    "How do I pick a lock? I cannot help with that.",
    "Say hello to the world, hello to you, and good bye.",
    "naïve café, 日本語 and emoji 😀 in one line",
]
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What an older sentencepiece model has: no pieces but the control pieces for the roles.
INSTRUCT = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ bos_token }}[INST] {{ message.content }} [/INST]{% endif %}{% endfor %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def build_hugging_face_folder(folder: Path, template: str | None = CHATML, *, pad: bool = True) -> Path:
    """A byte-level BPE tokenizer that would add a beginning-of-sequence token of its own if it were asked to."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>" if pad else None,
        chat_template=template,
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_hugging_face_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="session")
def tokenizer(hugging_face_folder: Path) -> ChatTokenizer:
    return load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder))


@pytest.fixture(scope="session")
def with_template(
    hugging_face_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], ChatTokenizer]:
    """The same tokenizer with another template."""

    def load(template: str) -> ChatTokenizer:
        path = tmp_path_factory.mktemp("template") / "chat.jinja"
        path.write_text(template, encoding="utf-8")
        return load_chat_tokenizer("HuggingFaceTokenizer", str(hugging_face_folder), str(path))

    return load


def build_sentencepiece_model(folder: Path) -> Path:
    """Trained on :data:`TEXT`; unknown characters become bytes."""
    (folder / "text.txt").write_text("\n".join(TEXT * 20), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tiny"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder / "tiny.model"


@pytest.fixture(scope="session")
def sentencepiece_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Paths of a sentencepiece model and of a template for it."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "chat.jinja").write_text(INSTRUCT, encoding="utf-8")
    return str(build_sentencepiece_model(folder)), str(folder / "chat.jinja")


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(sentencepiece_files: tuple[str, str]) -> ChatTokenizer:
    return load_chat_tokenizer("SentencePieceTokenizer", *sentencepiece_files)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (or raw bytes) and gives back the path."""

    def write(*rows: object, name: str = "train.jsonl") -> str:
        lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return str(path)

    return write


def chat(*turns: str) -> dict[str, list[dict[str, str]]]:
    """A row whose turns are the user's and the assistant's in turn."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]}
