"""The small world's tokenizer: one token for each word, in an ordinary Hugging Face tokenizer folder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_ogpsa.demo.tasks import GENERAL_TASKS, safety

PAD, BOS, EOS, USER, ASSISTANT, END, UNKNOWN = "<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, USER, ASSISTANT, END, UNKNOWN)

# The generation markers tell transformers which tokens the assistant wrote; the closing <|end|> is one of them, so that
# the model learns to stop.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|assistant|> ' }}{%- generation -%}{{ message['content'] + ' <|end|>' }}{%- endgeneration -%}"
    "{%- else -%}"
    "{{ '<|user|> ' + message['content'] + ' <|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|> ' }}{%- endif -%}"
)


def vocabulary() -> list[str]:
    """All tokens in the order of their ids: the special ones, then every word of every task, alphabetically."""
    words = safety.words().union(*(task.words for task in GENERAL_TASKS))
    return [*SPECIAL_TOKENS, *sorted(words)]


def write_tokenizer(folder: Path) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers and Megatron load by the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(WordLevel({token: index for index, token in enumerate(vocabulary())}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 64,
        "clean_up_tokenization_spaces": False,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder
