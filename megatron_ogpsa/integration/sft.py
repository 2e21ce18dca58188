"""Supervised fine-tuning in Megatron's loop: the data set provider and the forward step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_ogpsa.errors import UnsupportedError, UserError
from megatron_ogpsa.integration.agreement import agreed
from megatron_ogpsa.integration.batch import next_batch
from megatron_ogpsa.integration.sampling import EpochStream
from megatron_ogpsa.losses.sft import LossFunction, bind_loss

if TYPE_CHECKING:
    from megatron_ogpsa.data import ChatTokenizer, TokenizedChatDataset

ForwardStep = Callable[[Iterator[dict[str, torch.Tensor]], torch.nn.Module], tuple[torch.Tensor, LossFunction]]


def check_sft_arguments(args: argparse.Namespace) -> None:
    """Refuse flags with which fine-tuning would be wrong or would fail late.

    Raises:
        UserError: naming the flag and the remedy.
    """
    if not args.ogpsa_train_data:
        raise UserError("--ogpsa-train-data is missing: name the conversations to train on, such as data/safety.jsonl")
    if not args.calculate_per_token_loss:
        raise UserError(
            "--calculate-per-token-loss is off, so short answers would weigh more than long ones: switch it on"
        )
    if args.context_parallel_size > 1:
        raise UnsupportedError(
            "--context-parallel-size above 1 is not supported for fine-tuning: sequences are not split over its ranks yet; "
            "use --tensor-model-parallel-size with --sequence-parallel for long sequences"
        )
    if args.ogpsa_packing:
        _check_packing(args)


def _check_packing(args: argparse.Namespace) -> None:
    if args.transformer_impl == "transformer_engine":
        if args.micro_batch_size != 1:
            raise UserError(
                f"--micro-batch-size {args.micro_batch_size} with --ogpsa-packing: Transformer Engine takes packed rows "
                "one at a time, use --micro-batch-size 1 and a larger --seq-length"
            )
        return
    # Megatron's own attention honours an explicit mask only on its plain path (fused_softmax.py).
    if args.masked_softmax_fusion:
        raise UserError("--ogpsa-packing with --transformer-impl local needs --no-masked-softmax-fusion")
    if args.window_size is not None:
        raise UnsupportedError("--ogpsa-packing with --window-size and --transformer-impl local would mix documents")


def make_forward_step(*, validate: bool = True) -> ForwardStep:
    """The forward step that Megatron's schedules call once for each micro-batch and model chunk.

    Args:
        validate: check the loss through Megatron's rerun state machine, as training and evaluation do. Passes outside
            Megatron's training step must say False.
    """

    def forward_step(
        data_iterator: Iterator[dict[str, torch.Tensor]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        from megatron.core.utils import get_attr_wrapped_model
        from megatron.training import get_args, get_timers

        args, timers = get_args(), get_timers()
        timers("batch-generator", log_level=2).start()
        batch = None
        if _reads_data(args, get_attr_wrapped_model(model, "vp_stage")):
            batch = next_batch(
                data_iterator,
                packing=args.ogpsa_packing,
                transformer_engine=args.transformer_impl == "transformer_engine",
            )
        timers("batch-generator").stop()
        if batch is None:  # a middle stage gets activations from its neighbour and never calls the loss
            return model(None, None, None, labels=None), bind_loss(torch.empty(0), validate=validate)
        output = model(
            batch.tokens,
            batch.position_ids,
            batch.attention_mask,
            labels=batch.labels,
            loss_mask=batch.loss_mask,
            packed_seq_params=batch.packed_seq_params,
        )
        return output, bind_loss(batch.loss_mask, validate=validate)

    return forward_step


def _reads_data(args: argparse.Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage needs the batch: the ends do, and every stage that keeps packed documents apart.

    Each such rank reads the memory-mapped data set itself; that is cheaper than a broadcast over the tensor-parallel
    group, and the order of samples depends on the data-parallel rank alone.
    """
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return bool(args.ogpsa_packing or args.mtp_num_layers or is_first_or_last_pipeline_stage(vp_stage))


def datasets_provider(num_samples: tuple[int, int | None, int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
    """Megatron's data set provider: training and validation streams of ``--ogpsa-train-data``/``--ogpsa-valid-data``.

    Args:
        num_samples: samples wanted for training, validation (None: each once) and test (which has no data).
        vp_stage: virtual pipeline stage; every stage reads the same data.

    Raises:
        UserError: on all ranks alike, for data that cannot be read or is too little.
    """
    from megatron.core.datasets.utils import Split
    from megatron.training import get_args

    args = get_args()
    num_train, num_valid, _ = num_samples
    train = load_on_all_ranks(args.ogpsa_train_data)
    agreed(lambda: check_enough_samples(args, train, "--ogpsa-train-data", args.micro_batch_size))
    if args.dataloader_type == "cyclic":  # Megatron's random sampler counts epochs by itself
        train_stream: Any = train
    else:
        train_stream = EpochStream(train, length=num_train, seed=args.seed, split=Split.train)
    if args.ogpsa_valid_data is None:
        return train_stream, None, None
    valid = load_on_all_ranks(args.ogpsa_valid_data)
    agreed(lambda: check_enough_samples(args, valid, "--ogpsa-valid-data", args.eval_micro_batch_size))
    length = len(valid) if num_valid is None else num_valid
    return train_stream, EpochStream(valid, length=length, seed=None, split=Split.valid), None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: call me on every rank


@cache
def load_on_all_ranks(source: str, max_samples: int | None = None) -> TokenizedChatDataset:
    """Tokenise ``source`` with Megatron's tokenizer flags, the same on every rank; every rank must call it.

    With ``--data-cache-path`` rank 0 goes first, and the others find its cache.

    Raises:
        UserError: on all ranks alike.
    """
    from megatron.training import get_args

    from megatron_ogpsa.data import build_chat_dataset

    args = get_args()
    cache_dir = Path(args.data_cache_path) if args.data_cache_path else None

    def build() -> TokenizedChatDataset:
        return build_chat_dataset(
            source,
            chat_tokenizer(),
            seq_length=args.seq_length,
            packing=args.ogpsa_packing,
            cache_dir=cache_dir,
            max_samples=max_samples,
            show_progress=dist.get_rank() == 0,
        )

    if cache_dir is not None:
        agreed(lambda: build() if dist.get_rank() == 0 else None)
    return agreed(build)


@cache
def chat_tokenizer() -> ChatTokenizer:
    """The tokenizer of ``--tokenizer-type``, ``--tokenizer-model`` and ``--chat-template``.

    Raises:
        UserError: it cannot be loaded, or knows more tokens than the model's embedding has rows.
    """
    from megatron.training import get_args

    from megatron_ogpsa.data import load_chat_tokenizer

    args = get_args()
    tokenizer = load_chat_tokenizer(args.tokenizer_type, args.tokenizer_model, args.chat_template)
    if args.padded_vocab_size is not None and tokenizer.vocab_size > args.padded_vocab_size:
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model} has {tokenizer.vocab_size} tokens, the model's embedding only "
            f"{args.padded_vocab_size}: leave --vocab-size and --padded-vocab-size out, or make them larger"
        )
    return tokenizer


def check_enough_samples(
    args: argparse.Namespace, dataset: TokenizedChatDataset, flag: str, micro_batch_size: int
) -> None:
    """Refuse a data set that cannot give every data-parallel rank one micro-batch.

    Raises:
        UserError: naming the flag and both numbers.
    """
    needed = args.data_parallel_size * micro_batch_size
    if len(dataset) < needed:
        raise UserError(
            f"{flag}: {len(dataset)} samples are fewer than {args.data_parallel_size} data-parallel ranks × micro-batch "
            f"{micro_batch_size} = {needed}: add data, or lower --micro-batch-size or the number of ranks"
        )
