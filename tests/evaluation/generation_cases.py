"""What the ranks run to compare greedy answers with the oracle's."""

from __future__ import annotations

from argparse import Namespace

from megatron_ogpsa.evaluation.generation import generate
from megatron_ogpsa.integration.checkpoints.loaded_model import LoadedModel
from tests.core.layouts import LAYOUTS, Layout
from tests.core.megatron_model import build
from tests.core.oracle import ModelShape, random_weights


def answers(
    layout: str, prompts: list[list[int]], end_id: int, max_new_tokens: int, vocab_size: int
) -> list[list[int]]:
    """In batches of two, so that there are more batches than replicas and prompts of unlike length in one."""
    shape = ModelShape(**LAYOUTS[layout].model)
    module = build(LAYOUTS[layout], random_weights(shape, seed=1)).chunks[0].module.eval()
    return generate(
        LoadedModel(_arguments(LAYOUTS[layout], shape), module),
        prompts,
        max_new_tokens=max_new_tokens,
        end_ids=[end_id],
        pad_id=0,
        vocab_size=vocab_size,
        batch_size=2,
    )


def _arguments(layout: Layout, shape: ModelShape) -> Namespace:
    """Megatron's, as far as answers depend on them."""
    return Namespace(
        num_experts=shape.experts or None,
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
