"""What the ranks of a distributed test run; each function is a job of the harness and returns plain numbers."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.collectives import sum_over_ranks
from megatron_ogpsa.projection.segments import gram_and_dots
from tests.core import oracle
from tests.core.layouts import LAYOUTS, PRECISIONS, Layout
from tests.core.megatron_model import Batch, Training, build, canonical_gradient, plant

REFERENCES = ("math", "chat", "code")
ROWS = 8


def batch_of(shape: oracle.ModelShape, seed: int) -> Batch:
    """Random rows, half of them common to all seeds so that gradients overlap and the projection removes much.

    Rows have random numbers of supervised tokens, so that micro-batches weigh differently.
    """

    def rows(row_seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(row_seed)
        tokens = torch.randint(0, shape.vocabulary, (ROWS // 2, shape.positions + 1), generator=generator)
        mask = (torch.rand(ROWS // 2, shape.positions, generator=generator) < 0.6).float()
        mask[:, 0] = 1.0
        return tokens, mask

    (common, common_mask), (own, own_mask) = rows(0), rows(seed + 1)
    tokens, mask = torch.cat((common, own)), torch.cat((common_mask, own_mask))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def projected_gradient(training: Training) -> tuple[oracle.Tensors, Any]:
    """Step once and return the gradient that the inner optimizer saw, and what the step returned."""
    seen: dict[int, Tensor] = {}

    def record() -> bool:
        for group in training.optimizer.param_groups:
            for param in group["params"]:
                seen[id(param)] = param.grad.clone()
        return True

    training.optimizer.step_with_ready_grads = record
    result = training.optimizer.step()
    del training.optimizer.step_with_ready_grads
    return canonical_gradient(training, lambda main: seen[id(main)]), result


def refresh(training: Training, ogpsa: Any, batches: dict[str, Batch]) -> bool:
    ogpsa.begin_refresh()
    for name, batch in batches.items():
        training.gradient(batch)
        ogpsa.capture(name)
    return bool(ogpsa.finish_refresh())


def parity(layout: str, granularity: str, basis_dtype: str = "fp32") -> dict[str, float]:
    """The projected gradient of one step in ``layout`` against one unsharded fp64 process."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(LAYOUTS[layout], weights, clip_grad=0.0)
    ogpsa = attach(
        training.optimizer,
        training.chunks,
        OGPSAConfig(granularity=granularity, basis_dtype=basis_dtype, check_leak=True),  # type: ignore[arg-type]
    )
    references = {name: batch_of(shape, seed) for seed, name in enumerate(REFERENCES)}
    safety = batch_of(shape, seed=100)
    refresh(training, ogpsa, references)
    training.gradient(safety)
    actual, (_, grad_norm, _) = projected_gradient(training)

    plain = oracle.gradient(shape, weights, safety)
    reference_gradients = [oracle.gradient(shape, weights, batch) for batch in references.values()]
    expected = oracle.project(plain, reference_gradients, granularity)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "removed": ogpsa.metrics["removed"],
        "expected_removed": 1 - (oracle.norm(expected) / oracle.norm(plain)) ** 2,
        "rank": ogpsa.metrics["rank"],
        "leak": ogpsa.metrics["leak"],
        "num_blocks": len(ogpsa.block_names),
        "expected_num_blocks": len(weights) if granularity == "tensor" else 1,
        "world_size": dist.get_world_size(),
    }


# --------------------------------------------------------------------------------------- planted gradients

ALL_LAYOUTS: dict[str, Layout] = LAYOUTS | PRECISIONS


def planted(shape: oracle.ModelShape, count: int, *, integers: bool) -> list[oracle.Tensors]:
    """Gradients that overlap, representable in bf16, so that no layout and no precision rounds them."""
    result = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        common = torch.Generator().manual_seed(1000)
        tensors = {}
        for name, size in oracle.shapes_of(shape).items():
            if integers:
                tensors[name] = torch.randint(-4, 5, size, generator=generator).double()
            else:
                own, shared = torch.randn(size, generator=generator), torch.randn(size, generator=common)
                tensors[name] = (own + shared).bfloat16().double()
        result.append(tensors)
    return result


def planted_parity(layout: str, granularity: str) -> dict[str, float]:
    """The projection alone, without the rounding of a forward and backward pass, in each precision."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.0)
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(granularity=granularity))  # type: ignore[arg-type]
    *references, gradient = planted(shape, 4, integers=False)
    scale = training.optimizer.get_loss_scale().item()
    ogpsa.begin_refresh()
    for index, reference in enumerate(references):
        plant(training, reference, scale)
        ogpsa.capture(f"reference {index}")
    ogpsa.finish_refresh()
    plant(training, gradient, scale)
    actual, (_, grad_norm, _) = projected_gradient(training)
    expected = oracle.project(gradient, references, granularity)
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "scale": scale,
    }


HF_PARTS = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.linear_fc1.weight[gate]": "mlp.gate_proj.weight",
    "mlp.linear_fc1.weight[up]": "mlp.up_proj.weight",
} | {
    f"self_attention.linear_qkv.{kind}[{part}]": f"self_attn.{part}_proj.{kind}"
    for kind in ("weight", "bias")
    for part in "qkv"
}


def hf_name(block: str) -> str:
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", block)
    return f"model.layers.{match[1]}.{HF_PARTS[match[2]]}" if match else HF_PARTS[block]


def integer_gram(layout: str) -> bool:
    """Whether every block's Gram matrix of integer-valued gradients has exactly the oracle's numbers."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    training = build(LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(granularity="tensor"))
    references = planted(shape, 3, integers=True)
    ogpsa.begin_refresh()
    for index, reference in enumerate(references):
        plant(training, reference)
        ogpsa.capture(f"reference {index}")
    shard = ogpsa._shard
    gram = sum_over_ranks(gram_and_dots(shard.layout, ogpsa._captured_KN), shard.reduction.group)
    for block, actual in zip(ogpsa.block_names, gram, strict=True):
        rows = torch.stack([reference[hf_name(block)].flatten() for reference in references])
        if not torch.equal(actual, rows @ rows.T):
            raise AssertionError(f"{block}: {actual.tolist()} is not {(rows @ rows.T).tolist()}")
    return True


# ----------------------------------------------------------------------------------------------- the contract


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    """Count calls of torch.distributed's collectives by name."""
    counts: Counter[str] = Counter()

    def counting(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    names = ("all_reduce", "all_gather_into_tensor", "_all_gather_base", "broadcast", "all_gather_object", "barrier")
    names += ("reduce_scatter_tensor", "_reduce_scatter_base", "all_gather", "reduce", "all_to_all_single")
    with mock.patch.multiple(dist, **{name: counting(name, getattr(dist, name)) for name in names}):
        yield counts


def collectives(layout: str, granularity: str, num_references: int) -> dict[str, dict[str, int]]:
    """Collectives of a plain step, of a projected one, and of the orthonormalisation."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    training = build(LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    gradients = planted(shape, num_references + 1, integers=False)

    def step() -> dict[str, int]:
        plant(training, gradients[-1])
        with counted_collectives() as counts:
            training.optimizer.step()
        return dict(counts)

    step()  # Megatron caches answers about parameter groups in its first step
    plain = step()
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(granularity=granularity))  # type: ignore[arg-type]
    ogpsa.begin_refresh()
    with counted_collectives() as refresh_counts:
        for index, gradient in enumerate(gradients[:-1]):
            plant(training, gradient)
            ogpsa.capture(f"reference {index}")
        ogpsa.finish_refresh()
    return {"plain": plain, "projected": step(), "refresh": dict(refresh_counts)}


def detached_is_plain(layout: str) -> dict[str, bool]:
    """Parameters and returns after attach, projected and unprojected steps, and detach, against a run without."""
    shape = oracle.ModelShape(**LAYOUTS[layout].model)
    weights = oracle.random_weights(shape, seed=1)
    batches = [batch_of(shape, seed) for seed in range(3)]

    def parameters(training: Training) -> list[Tensor]:
        return [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]

    def run(training: Training) -> list[Any]:
        returned = []
        for batch in batches:
            training.gradient(batch)
            returned.append(tuple(training.optimizer.step()))
        return returned

    training = build(LAYOUTS[layout], weights)
    ogpsa = attach(training.optimizer, training.chunks)
    refresh(training, ogpsa, {"a": batches[1]})
    ogpsa.enabled = False
    disabled_returns = run(training)
    disabled_parameters = parameters(training)
    ogpsa.detach()
    restored = not {"prepare_grads", "get_grad_norm", "clip_grad_norm"} & vars(training.optimizer).keys()

    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    plain = build(LAYOUTS[layout], weights)
    plain_returns = run(plain)
    return {
        "restored": restored,
        "same_returns": disabled_returns == plain_returns,
        "same_parameters": all(map(torch.equal, disabled_parameters, parameters(plain))),
    }


def leaf_optimizer(layout: str) -> dict[str, float]:
    """The plugin on an optimizer outside a chain: the norm that ``step`` returns and the clipping that follows it."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1), clip_grad=0.5)
    (training.optimizer,) = training.optimizer.chained_optimizers
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(granularity="model"))
    *references, gradient = planted(shape, 3, integers=False)
    ogpsa.begin_refresh()
    for index, reference in enumerate(references):
        plant(training, reference)
        ogpsa.capture(f"reference {index}")
    ogpsa.finish_refresh()
    plant(training, gradient)
    actual, (_, grad_norm, _) = projected_gradient(training)
    expected = oracle.project(gradient, references, "model")
    return {
        "optimizer": type(training.optimizer).__name__,
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "clipped_norm": oracle.norm(actual),
    }


def not_finite(layout: str, bad_rank: int) -> dict[str, Any]:
    """NaN on one rank only: in a reference of a later refresh, then in the training gradient."""
    shape = oracle.ModelShape(**ALL_LAYOUTS[layout].model)
    training = build(ALL_LAYOUTS[layout], oracle.random_weights(shape, seed=1))
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(granularity="tensor"))
    good, bad, gradient = planted(shape, 3, integers=False)

    def poison() -> None:
        # Without the distributed optimizer the reduction over data parallelism has carried NaN to every copy.
        if dist.get_rank() == bad_rank or not ALL_LAYOUTS[layout].distributed_optimizer:
            for chunk in training.chunks:
                for param in chunk.parameters():
                    param.main_grad.fill_(float("nan"))

    def refreshed(tensors: oracle.Tensors, poisoned: bool) -> bool:
        ogpsa.begin_refresh()
        plant(training, good)
        ogpsa.capture("steady")
        plant(training, tensors)
        if poisoned:
            poison()
        ogpsa.capture("shaky")
        return ogpsa.finish_refresh()

    first = refreshed(gradient, poisoned=False)
    basis = ogpsa._basis_KN.clone()
    with mock.patch.object(logging.getLogger("megatron_ogpsa.plugin"), "warning") as warning:
        second = refreshed(bad, poisoned=True)
    plant(training, gradient)
    before = [param.detach().clone() for chunk in training.chunks for param in chunk.parameters()]
    poison()
    skipped = training.optimizer.step()
    unchanged = all(map(torch.equal, before, (p for chunk in training.chunks for p in chunk.parameters())))
    plant(training, gradient)
    success, norm, _ = training.optimizer.step()
    return {
        "refreshes": (first, second),
        "kept": torch.equal(basis, ogpsa._basis_KN),
        "warning": warning.call_args.args[0] % warning.call_args.args[1:],
        "skipped": skipped[0] is False,
        "unchanged": unchanged,
        "skipped_steps": ogpsa.skipped_steps,
        "goes_on": bool(success) and float(norm) == float(norm),
    }


def misuse() -> list[str]:
    """The errors of calls out of order."""
    training = build(LAYOUTS["dp2"], oracle.random_weights(oracle.ModelShape(), seed=1))
    ogpsa = attach(training.optimizer, training.chunks, OGPSAConfig(mode="conflict"))
    messages: list[str] = []

    def expect_error(action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            messages.append(f"{type(error).__name__}: {error}")

    expect_error(lambda: attach(training.optimizer, training.chunks))
    expect_error(lambda: ogpsa.capture("math"))
    expect_error(ogpsa.finish_refresh)
    ogpsa.begin_refresh()
    ogpsa.capture("math")
    expect_error(lambda: ogpsa.capture("math"))
    for index in range(8):
        ogpsa.capture(str(index))
    expect_error(ogpsa.finish_refresh)
    return messages
