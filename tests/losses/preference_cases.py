"""What the ranks run to compare preference losses with the oracle: answers of uneven length, two pairs in a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_ogpsa import OGPSAConfig, attach
from megatron_ogpsa.data import attention_mask_from_documents
from megatron_ogpsa.data.micro_batches import deal_out
from megatron_ogpsa.losses.preference import (
    PreferenceLossConfig,
    answer_log_probs,
    chosen_mask,
    summed_pair_loss,
)
from megatron_ogpsa.losses.sft import summed_token_loss
from megatron_ogpsa.reference_policy.passes import Passes
from tests.core import oracle
from tests.core.gradients import projected_gradient
from tests.core.layouts import LAYOUTS
from tests.core.megatron_model import Training, build

Row = dict[str, Tensor]
Loss = Callable[[Row, Tensor], Any]

BETA = 0.7
PAIRS_PER_ROW = 2
NUM_ROWS = 5
NUM_COMMON_ROWS = 3
NUM_PAIRS = 2 * NUM_ROWS - 1  # the last row has one pair


def rows_of_pairs(shape: oracle.ModelShape, seed: int) -> list[Row]:
    """Rows of four answers of 1 to 3 tokens, each with a prompt of one token before it, and padding.

    The first rows are those of all seeds, so that gradients overlap and the projection has something to remove.
    """
    generator = torch.Generator()

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    rows = []
    for index in range(NUM_ROWS):
        generator.manual_seed(index if index < NUM_COMMON_ROWS else 100 * seed + index)
        num_pairs = min(PAIRS_PER_ROW, NUM_PAIRS - PAIRS_PER_ROW * index)
        lengths = [int(draw(2, 5)) for _ in range(2 * num_pairs)]
        padding = shape.positions - sum(lengths)
        documents = [document for document, length in enumerate(lengths) for _ in range(length)]
        positions = [position for length in [*lengths, padding] for position in range(length)]
        rows.append(
            {
                "tokens": draw(0, shape.vocabulary, (shape.positions,)),
                "labels": draw(0, shape.vocabulary, (shape.positions,)),
                "loss_mask": torch.tensor(
                    [float(position > 0) for position in positions[: len(documents)]] + [0.0] * padding
                ),
                "position_ids": torch.tensor(positions),
                "document_ids": torch.tensor(documents + [-1] * padding),
                "pair_ids": torch.tensor(
                    [PAIRS_PER_ROW * index + pair if pair < num_pairs else -1 for pair in range(PAIRS_PER_ROW)]
                ),
            }
        )
    return rows


def oracle_log_probs(shape: oracle.ModelShape, weights: oracle.Tensors, rows: list[Row]) -> Tensor:
    """[pair, (chosen, rejected)]: every answer alone, unpacked and unpadded, in fp64."""
    sums = []
    for row in rows:
        for document in range(2 * int((row["pair_ids"] >= 0).sum())):
            here = row["document_ids"] == document
            losses = oracle.token_losses(shape, weights, row["tokens"][here][None], row["labels"][here][None])
            sums.append(-(losses * row["loss_mask"][here].double()).sum())
    return torch.stack(sums).view(-1, 2)


def forward_step(loss: Loss) -> Callable[[Iterator[Row], torch.nn.Module], tuple[Tensor, Any]]:
    def step(iterator: Iterator[Row], model: torch.nn.Module) -> tuple[Tensor, Any]:
        row = next(iterator)
        mask = attention_mask_from_documents(row["document_ids"])
        return model(row["tokens"], row["position_ids"], mask, labels=row["labels"]), partial(loss, row)

    return step


def backward(training: Training, rows: list[Row], loss: Loss) -> None:
    """The gradient of the mean loss, in Megatron's buffers."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    micro_batches = deal_out(
        rows,
        micro_batch_size=1,
        rank=parallel_state.get_data_parallel_rank(),
        size=parallel_state.get_data_parallel_world_size(),
        multiple=training.layout.pp if training.layout.vpp else 1,
    )
    iterators = [iter(micro_batches) for _ in training.chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step(loss),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=training.chunks,
        num_microbatches=len(micro_batches),
        seq_length=training.shape.positions,
        micro_batch_size=1,
        forward_only=False,
    )


def reference_log_probs(layout: str) -> dict[str, float]:
    """Of the reference policy's passes, against answers that are computed one by one, unsharded, in fp64."""
    sharding = LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(sharding, weights)
    rows = rows_of_pairs(shape, seed=3)

    def collect(row: Row, token_loss: Tensor, non_loss_data: bool = True) -> tuple[Tensor, Tensor]:
        log_probs = answer_log_probs(token_loss, row["loss_mask"], row["document_ids"], PAIRS_PER_ROW)
        return row["pair_ids"], log_probs

    passes = Passes(
        chunks=training.chunks,
        forward_step=forward_step(collect),
        forward_backward=get_forward_backward_func(),
        seq_length=shape.positions,
        micro_batch_size=1,
        multiple=sharding.pp if sharding.vpp is not None else 1,
    )
    actual, is_known = passes.run(rows, NUM_PAIRS)
    expected = oracle_log_probs(shape, weights, rows)
    return {
        "known": int(is_known.sum()),
        "error": float(((actual - expected).abs() / expected.abs()).max()),
    }


def preference_gradient(layout: str) -> dict[str, float]:
    """The projected gradient of the DPO loss, references being likelihoods of chosen answers, against the oracle."""
    sharding = LAYOUTS[layout]
    shape = oracle.ModelShape(**sharding.model)
    weights = oracle.random_weights(shape, seed=1)
    training = build(sharding, weights, clip_grad=0.0)
    safety, general = rows_of_pairs(shape, seed=3), [rows_of_pairs(shape, seed=seed) for seed in (4, 5)]
    # A policy that has moved away from its reference: margins of size 1, each pair with a weight of its own.
    shift = torch.randn(NUM_PAIRS, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    reference_N2 = oracle_log_probs(shape, weights, safety) + shift
    losses: list[float] = []

    def dpo(row: Row, token_loss: Tensor) -> Any:
        output = summed_pair_loss(
            token_loss,
            loss_mask=row["loss_mask"],
            document_ids=row["document_ids"],
            pair_ids=row["pair_ids"],
            reference_log_probs=reference_N2[row["pair_ids"].clamp_min(0)],
            config=PreferenceLossConfig(beta=BETA),
        )
        losses.append(float(output[0]))
        return output

    def nll_chosen(row: Row, token_loss: Tensor) -> Any:
        return summed_token_loss(token_loss, loss_mask=chosen_mask(row["loss_mask"], row["document_ids"]))

    ogpsa = attach(
        training.optimizer, training.chunks, OGPSAConfig(space="gradient", mode="orthogonal", granularity="model")
    )
    ogpsa.begin_refresh()
    for index, rows in enumerate(general):
        backward(training, rows, nll_chosen)
        ogpsa.capture(f"reference {index}")
    ogpsa.finish_refresh()
    backward(training, safety, dpo)
    actual, (_, grad_norm, _) = projected_gradient(training)

    def mean_dpo(weights: oracle.Tensors) -> Tensor:
        gain_N2 = oracle_log_probs(shape, weights, safety) - reference_N2
        return -logsigmoid(BETA * (gain_N2[:, 0] - gain_N2[:, 1])).mean()

    def mean_nll(rows: list[Row]) -> Callable[[oracle.Tensors], Tensor]:
        tokens = sum(float((chosen_mask(row["loss_mask"], row["document_ids"])).sum()) for row in rows)
        return lambda weights: -oracle_log_probs(shape, weights, rows)[:, 0].sum() / tokens

    plain = oracle.gradient_of(mean_dpo, weights)
    expected = oracle.project(plain, [oracle.gradient_of(mean_nll(rows), weights) for rows in general], "model")
    return {
        "error": oracle.relative_error(actual, expected),
        "norm_error": abs(float(grad_norm) / oracle.norm(expected) - 1),
        "removed": ogpsa.metrics["removed"],
        "loss": sum(losses),  # on the last stage, of this data-parallel rank's pairs
        "expected_loss": NUM_PAIRS * float(mean_dpo(weights)),
    }
