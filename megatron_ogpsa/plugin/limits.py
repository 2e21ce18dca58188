"""What the projection cannot do with, by the fields of Megatron's configurations, which its arguments share.

Asked twice: by flags before anything is built (``integration/arguments/projection.py``), and by what ``attach`` is given.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_ogpsa.refusal import Refusal

_BUFFERS = "its gradients lie outside Megatron's gradient buffers"
_SHARDED = "use --use-distributed-optimizer, which shards optimizer state and gradients"
_GRADIENT_SPACE = "leave the flag out, or use --ogpsa-space gradient"
_WITHIN = "the fp32 parameters lie within the inner optimizer"
_SEVERAL_EXPERTS = "blocks would hold several experts"


def splits_without_sequences(model: Any) -> bool:
    """Tensor parallelism without sequence parallelism: Megatron then sums few of the gradients that copies have in part."""
    return model.tensor_model_parallel_size > 1 and not model.sequence_parallel


def _has_weight_shards(model: Any) -> bool:
    """More shards of a weight than tensor-parallel ranks; None where nobody has asked."""
    tensor = model.tensor_model_parallel_size
    experts = model.expert_tensor_parallel_size or tensor
    shards, of_experts = model.tensor_parallel_num_weight_shards, model.expert_tensor_parallel_num_weight_shards
    return (shards or 0) > tensor or (of_experts or 0) > experts


DRIFTING_KEYS = Refusal(
    "--multi-latent-attention",
    "in tensor parallelism without --sequence-parallel Megatron gives each copy of the keys' projection the gradient of one "
    "rank's heads, so that copies drift apart",
    "add --sequence-parallel",
    lambda model: model.multi_latent_attention and splits_without_sequences(model),
)
"""``core/transformer/multi_latent_attention.py`` sums what the ranks' heads make of them with sequence parallelism only."""

MODELS = (
    Refusal(
        "--mtp-num-layers",
        "losses of references would enter those that the log shows",
        "fine-tune without multi-token prediction",
    ),
    DRIFTING_KEYS,
    Refusal(
        "--experimental-attention-variant gated_delta_net",
        "in tensor parallelism without --sequence-parallel Megatron gives each copy of its norm the gradient of one rank's "
        "heads, so that copies drift apart",
        "add --sequence-parallel",
        lambda model: model.experimental_attention_variant == "gated_delta_net" and splits_without_sequences(model),
    ),
    Refusal(
        "--tensor-parallel-num-weight-shards or --expert-tensor-parallel-num-weight-shards",
        "weights are sharded over an axis that the projection does not count yet",
        "use --tensor-model-parallel-size",
        _has_weight_shards,
    ),
    Refusal("--moe-single-grouped-weight", _SEVERAL_EXPERTS),
    Refusal("--moe-single-grouped-bias", _SEVERAL_EXPERTS),
)
"""Of the model's configuration."""

MEGATRON_FSDP = Refusal("--use-megatron-fsdp", _BUFFERS, _SHARDED)
WRAPPERS = (MEGATRON_FSDP, Refusal("--use-torch-fsdp2", _BUFFERS, _SHARDED))
"""Of what wraps a model; the configuration of data parallelism knows of the first alone."""

OPTIMIZERS = (
    Refusal(
        "--optimizer {0.optimizer}",
        "the basis is laid out for Adam's and SGD's shards, and layer-wise optimizers give whole parameters to ranks",
        "use --optimizer adam or sgd",
        lambda optimizer: optimizer.optimizer not in ("adam", "sgd"),
    ),
    Refusal(
        "--optimizer sgd with --use-distributed-optimizer",
        "Megatron shards Adam's state alone",
        "leave --use-distributed-optimizer out, or use --optimizer adam",
        lambda optimizer: optimizer.optimizer == "sgd" and optimizer.use_distributed_optimizer,
    ),
    Refusal(
        "--optimizer-cuda-graph",
        "the projection decides on the host whether the gradient is finite, which a graph cannot hold",
    ),
)
"""Of the optimizer's configuration."""

OPTIMIZERS_OF_UPDATES = (
    Refusal("--optimizer-cpu-offload", _WITHIN, _GRADIENT_SPACE),
    Refusal("--use-precision-aware-optimizer", _WITHIN, _GRADIENT_SPACE),
)
MODELS_OF_UPDATES = (
    Refusal("--qk-clip", "it changes weights after the step, where nothing is projected", _GRADIENT_SPACE),
)
"""Of both configurations, where ``space`` is ``update``."""

SKIPPED_STEPS = Refusal(
    "grad_norm_skip_threshold",
    "a stage without trainable parameters would wait for the others",
    "leave it at infinity, or use --ogpsa-space gradient",
    lambda optimizer: math.isfinite(optimizer.grad_norm_skip_threshold),
)
"""Likewise; it has no flag. Megatron then skips the step on those ranks alone that hold parameters."""
