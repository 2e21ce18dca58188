"""Data sets in Megatron's loop: read alike on every rank, streamed to its data loaders."""

from __future__ import annotations

import argparse
import logging
import os
import time
from collections.abc import Callable, Sized
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import WHOLE_SET
from megatron_ogpsa.integration.inputs.sampling import EpochStream, EvaluationStream
from megatron_ogpsa.integration.ranks.agreement import agreed
from megatron_ogpsa.integration.ranks.turns import done_by, told_by_rank_0

if TYPE_CHECKING:
    from megatron_ogpsa.data import ChatTokenizer, TokenizedChatDataset, TokenizedPreferenceDataset

Rows = Dataset[dict[str, torch.Tensor]]

logger = logging.getLogger(__name__)


def make_datasets_provider(load: Callable[[str], Rows]) -> Callable[..., tuple[Any, Any, None]]:
    """Megatron's data set provider: training and validation streams of ``--ogpsa-train-data``/``--ogpsa-valid-data``.

    Args:
        load: reads a source, the same on every rank; raises UserError on all ranks alike.
    """

    def datasets_provider(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
        """``num_samples``: wanted for training, validation and test (which has no data)."""
        from megatron.core.datasets.utils import Split
        from megatron.training import get_args

        args = get_args()
        num_train, *_ = num_samples
        train = load(args.ogpsa_train_data)
        agreed(lambda: check_enough_samples(args, train, "--ogpsa-train-data", args.micro_batch_size))
        if dist.get_rank() == 0 and (told := balancing_told(args, train)):
            logger.warning(told)
        if args.dataloader_type == "cyclic":  # Megatron's random sampler counts epochs by itself
            train_stream: Any = train
        else:
            # A batch more than is trained on: Megatron refuses a loader of which everything was consumed, and so a run
            # that is started again after its last step. One that goes on with smaller batches has consumed more than these.
            left = (args.train_iters - args.iteration) * args.global_batch_size if args.train_iters else 0
            length = max(num_train, args.consumed_train_samples + left) + args.global_batch_size
            train_stream = EpochStream(train, length=length, seed=args.seed, split=Split.train)
        if args.ogpsa_valid_data is None or args.eval_iters == 0:
            return train_stream, None, None
        valid = load(args.ogpsa_valid_data)
        return train_stream, _evaluations(args, valid), None

    datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: call me on every rank
    return datasets_provider


def balancing_told(args: argparse.Namespace, train: Rows) -> str:
    """How much stronger than its coefficient a loss that balances experts is, if that is much; empty otherwise.

    Megatron multiplies it by a batch's positions, padding and prompts among them, and divides all gradients by the tokens
    that the loss counts (``core/transformer/moe/router.py``, ``attach_and_log_load_balancing_loss``).
    """
    flags = [name for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff") if _is_on(getattr(args, name))]
    supervised = getattr(train, "num_supervised_tokens", 0)
    if not args.num_experts or not flags or not supervised:
        return ""
    factor = _length(train) * args.seq_length / supervised
    if factor < _MUCH_STRONGER:
        return ""
    packing = "" if args.ogpsa_packing else "pack rows with --ogpsa-packing, and "
    return (
        f"--{flags[0].replace('_', '-')} acts {factor:.1f} times as strongly as it says: Megatron weighs it by all "
        f"positions, of which 1 in {factor:.1f} is learnt here: {packing}divide it by what is left of that"
    )


_MUCH_STRONGER = 1.5


def _is_on(coefficient: float | list[float] | None) -> bool:
    return any(coefficient) if isinstance(coefficient, list) else bool(coefficient)


def _evaluations(args: argparse.Namespace, valid: Rows) -> EvaluationStream:
    """As many as there may be from here on; by default each takes the whole set."""
    from megatron.core.datasets.utils import Split
    from megatron.training import print_rank_0

    batch, rows = args.eval_global_batch_size, _length(valid)
    if args.eval_iters == WHOLE_SET:
        args.eval_iters = -(-rows // batch)
        args.consumed_valid_samples = max(
            args.consumed_valid_samples, 0
        )  # of a checkpoint without it Megatron multiplies
    window = args.eval_iters * batch
    print_rank_0(f"validation: {min(window, rows)} of {rows} rows at each evaluation, the same ones")
    evaluations = (args.train_iters or 0) // (args.eval_interval or args.train_iters or 1) + 2
    length = args.consumed_valid_samples + evaluations * window
    return EvaluationStream(valid, window=window, length=length, split=Split.valid)


@cache
def load_conversations(source: str, max_samples: int | None = None) -> TokenizedChatDataset:
    """Tokenise conversations with Megatron's tokenizer flags, the same on every rank; every rank must call it.

    Raises:
        UserError: on all ranks alike.
    """
    from megatron_ogpsa.data import TokenizedChatDataset, build_chat_dataset

    return _load_on_all_ranks(TokenizedChatDataset, build_chat_dataset, source, max_samples)


@cache
def load_pairs(source: str, max_samples: int | None = None) -> TokenizedPreferenceDataset:
    """As :func:`load_conversations`, for preference pairs."""
    from megatron_ogpsa.data import TokenizedPreferenceDataset, build_preference_dataset

    return _load_on_all_ranks(TokenizedPreferenceDataset, build_preference_dataset, source, max_samples)


def _load_on_all_ranks[T: (TokenizedChatDataset, TokenizedPreferenceDataset)](
    kind: type[T], build_dataset: Callable[..., T], source: str, max_samples: int | None
) -> T:
    """Where there is a folder to keep it in, one rank tokenizes for all. Rank 0 says what was read."""
    from megatron.training import get_args, print_rank_0

    args = get_args()
    cache_dir = data_folder(args)
    tokenizer = agreed(chat_tokenizer)
    _warn_of_endless_turns(tokenizer)

    def build() -> T:
        return build_dataset(
            source,
            tokenizer,
            seq_length=args.seq_length,
            packing=args.ogpsa_packing,
            cache_dir=cache_dir,
            max_samples=max_samples,
            show_progress=dist.get_rank() == 0,
        )

    if cache_dir is None:
        began = time.monotonic()
        dataset = agreed(build)
        if (seconds := time.monotonic() - began) > _LONG_SECONDS:
            print_rank_0(
                f"data {source}: each rank has tokenized it for itself, in {seconds:.0f} s: --data-cache-path FOLDER lets "
                "one do it for all, and keeps it"
            )
    else:
        fingerprint = _build_once(lambda: build().fingerprint, kind, cache_dir, source)
        dataset = agreed(lambda: kind.read(cache_dir, fingerprint, seq_length=args.seq_length, pad_id=tokenizer.pad_id))
    print_rank_0(described(source, dataset, is_packed=args.ogpsa_packing))
    return dataset


@cache
def _warn_of_endless_turns(tokenizer: ChatTokenizer) -> None:
    from megatron.training import print_rank_0

    from megatron_ogpsa.data.tokenizer import ENDLESS_TURN, ENDLESS_TURN_REMEDY

    try:
        if tokenizer.turn_end_id is None:
            print_rank_0(f"WARNING: {tokenizer.template.name}: {ENDLESS_TURN}: {ENDLESS_TURN_REMEDY}")
    except UserError:
        pass  # a template that wants more than a question and an answer; the data may have it


DATA_FOLDER = "tokenized"
"""Beside the checkpoints, which lie where all ranks write and which a run that goes on finds again."""


def data_folder(args: argparse.Namespace) -> Path | None:
    """Where tokenized data is kept: ``--data-cache-path``, or else in ``--save``; None in a run that saves nothing."""
    if args.data_cache_path:
        return Path(args.data_cache_path)
    return Path(args.save) / DATA_FOLDER if getattr(args, "save", None) else None


def _build_once(
    build: Callable[[], str], kind: type[TokenizedChatDataset | TokenizedPreferenceDataset], folder: Path, source: str
) -> str:
    """Build what is not there yet: rank 0 does, and then a rank of each node that does not see what rank 0 has built.

    Args:
        build: builds or finds it, and gives its fingerprint.

    Returns:
        the fingerprint. Only ranks that may build have read the source for it.

    Raises:
        UserError: on all ranks alike: it cannot be built; or nodes have files of one name with other content.
    """
    what = f"tokenizing {source}"
    fingerprint = told_by_rank_0(build, what)
    workers = _first_ranks_without(kind.folder(folder, fingerprint))
    if not workers:
        return fingerprint

    def build_here() -> None:
        if build() != fingerprint:
            raise UserError(
                f"{source}: has other content on this node than on rank 0's; copy it anew, or name one that all nodes share"
            )

    done_by(workers, build_here, what)
    return fingerprint


def _first_ranks_without(folder: Path) -> list[int]:
    """Of each node on which a rank does not see the folder, the first such rank."""
    rank = dist.get_rank()
    node = rank - int(os.environ.get("LOCAL_RANK", rank))  # launchers number ranks node by node
    seen: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seen, (node, os.path.isdir(folder)))  # Path's raises where it may not look
    first: dict[int, int] = {}
    for other, (its_node, sees) in enumerate(seen):
        if not sees:
            first.setdefault(its_node, other)
    return sorted(first.values())


_LONG_SECONDS = 30.0
"""For which every rank may tokenize the same without a word."""

_LITTLE_USE = 0.9
"""Below this share of tokens packing is worth a word."""


def described(source: str, dataset: TokenizedChatDataset | TokenizedPreferenceDataset, *, is_packed: bool) -> str:
    """One line: samples, rows, how much of what is computed is padding, and what is cut or left out."""
    share = dataset.useful_token_share
    remedy = "" if is_packed or share >= _LITTLE_USE else "; --ogpsa-packing puts several samples into a row"
    lost = "".join(f"; {loss}" for loss in dataset.summary.losses(dataset.num_samples, dataset.seq_length))
    return (
        f"data {source}: {dataset.num_samples} samples in {len(dataset)} rows of {dataset.seq_length} positions, "
        f"{share:.1%} tokens, {1 - share:.1%} padding{lost}{remedy}"
    )


@cache
def chat_tokenizer() -> ChatTokenizer:
    """The tokenizer of ``--tokenizer-type``, ``--tokenizer-model`` and ``--chat-template``.

    Checkpoints have Megatron's arguments, so what chats with the trained model is put among them: ``chat_template_text``, and
    ``chat_end_id``, in which answers end.

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
    args.chat_template_text, args.chat_end_id = tokenizer.template.source, None
    with suppress(UserError):  # a template that wants more than a question and an answer; the data may have it
        args.chat_end_id = tokenizer.turn_end_id
    return tokenizer


def check_enough_samples(args: argparse.Namespace, dataset: Rows, flag: str, micro_batch_size: int) -> None:
    """Refuse a data set that cannot give every data-parallel rank one micro-batch.

    Raises:
        UserError: naming the flag and both numbers.
    """
    needed = args.data_parallel_size * micro_batch_size
    if _length(dataset) < needed:
        raise UserError(
            f"{flag}: {_length(dataset)} samples are fewer than {args.data_parallel_size} data-parallel ranks × "
            f"micro-batch {micro_batch_size} = {needed}: add data, or lower --micro-batch-size or the number of ranks"
        )


def _length(dataset: Rows) -> int:
    assert isinstance(dataset, Sized)
    return len(dataset)
