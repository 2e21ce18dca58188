"""From a list of flags to Megatron's validated arguments: whatever is wrong with them is one line."""

from __future__ import annotations

import argparse
import math
import sys
import traceback

from megatron_ogpsa.errors import UserError, one_line
from megatron_ogpsa.integration.arguments.cpu import check_supported_on_cpu
from megatron_ogpsa.integration.arguments.loop import check_before_validation, check_places, require_flags
from megatron_ogpsa.integration.arguments.parser import add_training_arguments, parse_flags
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu
from megatron_ogpsa.system.files import file_error


def validated_arguments(flags: list[str], *, for_training: bool = False) -> argparse.Namespace:
    """Parse, check and let Megatron validate ``flags``; Megatron's globals (arguments, tokenizer, timers) are set."""
    from megatron.training.arguments import parse_and_validate_args

    from megatron_ogpsa.data import load_chat_tokenizer

    early = parse_flags(flags)
    if install_if_no_gpu():
        check_supported_on_cpu(early, for_training=for_training)
    if for_training:
        check_before_validation(early)
    else:
        check_places(early, ("load", "pretrained_checkpoint"))
    require_flags(early, for_training=for_training)
    if early.tokenizer_type is None:
        raise UserError("--tokenizer-type is missing: HuggingFaceTokenizer or SentencePieceTokenizer")
    # Megatron builds its tokenizer from the same flags, but reports what is wrong with them in a traceback.
    load_chat_tokenizer(early.tokenizer_type, early.tokenizer_model, early.chat_template)
    # The tokenizer that was given and looked at, also where a checkpoint's arguments name another.
    flags = [*flags, *_padded_vocabulary(early), "--no-use-tokenizer-model-from-checkpoint-args"]
    sys.argv = [sys.argv[0], *flags]  # Megatron's parser reads the command line
    try:
        args = parse_and_validate_args(extra_args_provider=add_training_arguments)
    except (AssertionError, ValueError, NotImplementedError, RuntimeError) as error:
        raise UserError(f"Megatron refuses these flags: {one_line(error)}") from error
    except Exception as error:
        if not any(frame.name == "load_args_from_checkpoint" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise file_error(
            error,
            f"--use-checkpoint-args: --load {early.load}: Megatron cannot read this checkpoint's arguments "
            f"({one_line(error)}): give the flags themselves, or name a whole checkpoint with --ckpt-step",
        ) from error
    except SystemExit as end:  # --use-checkpoint-args reads the tracker before there are ranks to agree on another one
        if end.code in (None, 0):
            raise UserError(f"--load {early.load}: Megatron has ended without a word of error: see above") from None
        raise
    if args.ckpt_format != "torch_dist":
        args.verify_integrity = False  # Megatron writes manifests for this format alone
    if args.ogpsa_valid_data is None:
        args.eval_iters = 0  # there is nothing to evaluate on, and Megatron would evaluate by default
    return args


def _padded_vocabulary(args: argparse.Namespace) -> list[str]:
    """``--vocab-size`` as Megatron pads it, which it does with the tokenizer's length alone.

    Published models have more rows of embeddings than their tokenizers have tokens (Qwen2.5 7B: 152,064 and 151,665); of a
    checkpoint that has more rows than the model Megatron loads the first without a word.
    """
    if not args.vocab_size or args.padded_vocab_size:
        return []
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return ["--padded-vocab-size", str(math.ceil(args.vocab_size / multiple) * multiple)]
