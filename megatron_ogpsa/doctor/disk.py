"""How large a model and its checkpoints are, and whether the disk can take those that the run will write."""

from __future__ import annotations

import argparse
import copy
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ogpsa.checkpoints import examine
from megatron_ogpsa.doctor.findings import Finding, fail, ok, size_in_words, warn
from megatron_ogpsa.planning.costs import share_on_accelerator, state_bytes
from megatron_ogpsa.system.disk import nearest_folder

_FP32 = 4

_ESTIMATED_BYTES = 18
"""What Megatron's estimate takes for each parameter without the distributed optimizer."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What one run will write.

    Attributes:
        folder: of ``--save``.
        size: bytes of one checkpoint.
        number: of checkpoints until the run's end, at least 1.
    """

    folder: Path
    size: int
    number: int


def elements_of(args: argparse.Namespace, vocabulary: int) -> int:
    """Parameters of the model, by Megatron's own estimate (training/theoretical_memory_usage.py): biases are left out.

    Args:
        args: validated.
        vocabulary: tokens, before padding.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    whole = copy.copy(args)  # the estimate is of one rank, and changes what it is given
    whole.padded_vocab_size = args.padded_vocab_size or vocab_size_with_padding(vocabulary, args, logging_enabled=False)
    for axis in ("tensor_model", "pipeline_model", "expert_tensor", "expert_model"):
        setattr(whole, f"{axis}_parallel_size", 1)
    whole.use_distributed_optimizer = False
    return round(compute_weight_and_optimizer_memory(whole) / _ESTIMATED_BYTES)


def bytes_per_element(args: argparse.Namespace) -> int:
    """Of a checkpoint with the optimizer: weights, their fp32 copy, and the optimizer's moments."""
    weight = int(args.params_dtype.itemsize)
    if args.no_save_optim:
        return weight
    moments = (1 if args.sgd_momentum else 0) if args.optimizer == "sgd" else 2
    has_copy = args.use_distributed_optimizer or weight < _FP32
    return weight + _FP32 * (moments + has_copy)


def expert_elements_of(args: argparse.Namespace, vocabulary: int) -> int:
    """Of these, those of routed experts: what as many experts more would add, their rows of the router included."""
    if not args.num_experts:
        return 0
    doubled = copy.copy(args)
    doubled.num_experts = 2 * args.num_experts
    return elements_of(doubled, vocabulary) - elements_of(args, vocabulary)


def training_bytes(args: argparse.Namespace, elements: int, of_experts: int, *, on_gpu: bool) -> int:
    """Memory of all ranks, where they compute, for weights, gradients, optimizer state and basis; without activations.

    Experts have as many copies as ranks are left to them beside their own axes.

    Args:
        args: validated.
        elements: of :func:`elements_of`.
        of_experts: of :func:`expert_elements_of`.
        on_gpu: whether ranks compute on GPUs, whose memory what lies on the host does not take.
    """
    expert_ranks = (
        args.expert_tensor_parallel_size * args.expert_model_parallel_size * args.pipeline_model_parallel_size
    )
    weights = args.params_dtype.itemsize
    gradients = _FP32 if args.accumulate_allreduce_grads_in_fp32 else weights
    state = state_bytes(args) * (share_on_accelerator(args) if on_gpu else 1.0)
    references = len(args.ogpsa_reference) * args.ogpsa_rank_per_reference
    is_away = args.ogpsa_basis_device == "cpu" and on_gpu
    basis = 0 if is_away else references * (2 if args.ogpsa_basis_dtype == "bf16" else _FP32)
    if references and gradients < _FP32 and not args.use_precision_aware_optimizer:
        basis += _FP32  # a copy of the gradient, which is what is projected
    total = 0.0
    for number, copies in (
        (elements - of_experts, args.data_parallel_size * args.context_parallel_size),
        (of_experts, args.world_size // expert_ranks),
    ):
        shards = min(args.num_distributed_optimizer_instances if args.use_distributed_optimizer else copies, copies)
        total += number * (copies * (weights + gradients) + shards * (state + basis))
    return round(total)


def saving_of(args: argparse.Namespace, elements: int) -> Saving | None:
    """What the run will write until its end; None if it saves nothing.

    Args:
        args: validated.
        elements: of :func:`elements_of`.
    """
    if not args.save or args.skip_train:
        return None
    folder = Path(args.save)
    left = max((args.train_iters or 0) - _iteration(folder), 1)
    number = -(-left // args.save_interval) if args.save_interval else 1
    return Saving(folder=folder, size=elements * bytes_per_element(args), number=number)


def _iteration(folder: Path) -> int:
    chosen = examine(folder, contents=False).iteration
    return chosen or 0


def check_disk(
    savings: Sequence[Saving], free_of: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
) -> list[Finding]:
    """Free space of each file system against what will be written there; and whether it can be written at all.

    Args:
        savings: of all runs of the job.
        free_of: bytes that are free where a folder lies.
    """
    by_device: dict[int, list[Saving]] = {}
    for saving in savings:
        by_device.setdefault(nearest_folder(saving.folder).stat().st_dev, []).append(saving)
    return [_check_file_system(group, free_of(nearest_folder(group[0].folder))) for group in by_device.values()]


def _check_file_system(savings: Sequence[Saving], free: int) -> Finding:
    largest, total = max(s.size for s in savings), sum(s.size * s.number for s in savings)
    number = sum(s.number for s in savings)
    where = os.path.commonpath([saving.folder for saving in savings])
    planned = f"{number} checkpoint{'s' * (number > 1)} of about {size_in_words(largest)}"
    text = f"{where}: {size_in_words(free)} free for {planned}"
    refused = [str(folder) for s in savings if not os.access(folder := nearest_folder(s.folder), os.W_OK | os.X_OK)]
    if refused:
        return fail("disk space", f"{refused[0]} cannot be written by this user", "name another --save")
    if free < largest:
        return fail("disk space", f"{text}: not one fits", "free space, or name another --save")
    if free < total:
        remedy = "free space, raise --save-interval, delete old checkpoints while it runs, or --no-save-optim"
        return warn("disk space", f"{text}: not all of them fit", remedy)
    return ok("disk space", text)
