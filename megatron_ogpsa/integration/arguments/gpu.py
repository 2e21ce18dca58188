"""Defaults of Megatron's flags on a machine with a GPU, by which of NVIDIA's libraries are there.

Megatron's own are those of its container, where Apex and Transformer Engine are; from PyPI comes at most the second. What
needs one that is missing would end the run when the model is built. Flags that are given still win.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec


def is_importable(name: str) -> bool:
    """Whether a module is installed; it is not imported."""
    return find_spec(name) is not None


def set_gpu_defaults(parser: argparse.ArgumentParser, is_there: Callable[[str], bool] = is_importable) -> None:
    """Leave out what is not installed.

    ``core/tensor_parallel/layers.py`` (the output layer is Megatron's own even among Transformer Engine's layers),
    ``core/fusions/fused_softmax.py``, ``core/transformer/torch_norm.py`` and ``transformer_config.py`` say what needs what.
    """
    if not is_there("fused_weight_gradient_mlp_cuda"):
        parser.set_defaults(gradient_accumulation_fusion=False)
    if not is_there("scaled_masked_softmax_cuda"):
        parser.set_defaults(masked_softmax_fusion=False)
    if not is_there("apex"):
        parser.set_defaults(no_persist_layer_norm=True)
    if not is_there("transformer_engine"):
        parser.set_defaults(transformer_impl="local", apply_rope_fusion=False)
