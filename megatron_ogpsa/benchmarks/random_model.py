"""A model of random weights as a Hugging Face folder: to measure speed, which does not depend on what they are.

```
python -m megatron_ogpsa.benchmarks.random_model llama-1b --tokenizer smollm2
```

By default the shape of Llama 3.2 1B: 16 layers of width 2048 with 32 heads of 64, of which 8 for keys and values,
feed-forward layers of 8192, tied embeddings; in bf16, with the vocabulary of the tokenizer that it is given.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_ogpsa.errors import UserError

HEAD_SIZE = 64
QUERIES_PER_GROUP = 4
FEED_FORWARD = 4
"""Widths of a feed-forward layer in those of the model."""

_TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
)


def write(folder: Path, tokenizer: Path, *, layers: int, hidden_size: int, seed: int) -> int:
    """Write the folder; how many parameters its model has.

    Args:
        tokenizer: a Hugging Face folder, of which only the tokenizer's files are read.

    Raises:
        UserError: the tokenizer cannot be read, or the width is no multiple of what a group of heads takes.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    group = HEAD_SIZE * QUERIES_PER_GROUP
    if hidden_size < group or hidden_size % group:
        raise UserError(
            f"--hidden-size {hidden_size}: use a multiple of {group}, {QUERIES_PER_GROUP} heads of {HEAD_SIZE}"
        )
    try:
        vocabulary = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {tokenizer}: {str(error).splitlines()[0]}") from None
    heads = hidden_size // HEAD_SIZE
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=FEED_FORWARD * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // QUERIES_PER_GROUP,
        head_dim=HEAD_SIZE,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=vocabulary.bos_token_id,
        eos_token_id=vocabulary.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    for pattern in _TOKENIZER_FILES:
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main(argv: Sequence[str] | None = None) -> int:
    """Write a folder and say how large the model is."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ogpsa.benchmarks.random_model")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="which is written")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="FOLDER", help="a Hugging Face folder with one"
    )
    parser.add_argument("--layers", type=int, default=16, metavar="N", help="(16)")
    parser.add_argument("--hidden-size", type=int, default=2048, metavar="N", help="(2048)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(1)")
    args = parser.parse_args(argv)
    try:
        if args.layers < 1:
            raise UserError(f"--layers {args.layers}: use 1 or more")
        number = write(args.folder, args.tokenizer, layers=args.layers, hidden_size=args.hidden_size, seed=args.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.folder}: {number:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
