"""TRL's own preference losses on the same log-probabilities give the same values.

TRL computes them in the middle of its trainer's step: the trainer and the model are stood in for, the arithmetic is
TRL's. It is a private method, hence the pinned version in setup.cfg.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ogpsa.losses.preference import PreferenceLossConfig, summed_pair_loss

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what TRL says on import is not about this project
    from trl.trainer.dpo_trainer import DPOTrainer

LENGTHS = [(3, 5), (6, 1), (2, 2), (4, 7)]  # tokens of the chosen and of the rejected answer
PROMPT = 2
NUM_PAIRS, WIDTH = len(LENGTHS), PROMPT + 7
BETA = 0.3

CASES = {
    "sigmoid": PreferenceLossConfig(beta=BETA),
    "sigmoid_norm": PreferenceLossConfig(beta=BETA, length_normalised=True),
    "hinge": PreferenceLossConfig(kind="hinge", beta=BETA),
    "ipo": PreferenceLossConfig(kind="ipo", beta=BETA),
}
"""By TRL's name. It smooths no labels."""


@pytest.fixture(scope="module")
def log_probs() -> dict[str, Tensor]:
    """Per token, [pair, side, position], zero outside the answers; and sums of the reference policy, [pair, side]."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(NUM_PAIRS, 2, WIDTH, dtype=torch.float64)
    for pair, lengths in enumerate(LENGTHS):
        for side, length in enumerate(lengths):
            mask[pair, side, PROMPT : PROMPT + length] = 1.0
    tokens = -torch.rand(mask.shape, dtype=torch.float64, generator=generator) * 3 * mask
    return {
        "mask": mask,
        "tokens": tokens,
        "reference": -torch.rand(NUM_PAIRS, 2, dtype=torch.float64, generator=generator) * 8,
    }


def trl(log_probs: dict[str, Tensor], weights: dict[str, float]) -> tuple[float, dict[str, float]]:
    """TRL's mean loss, a weighted sum of those named, and the figures that it logs."""

    def stacked(values: Tensor) -> Tensor:  # all chosen answers, then all rejected ones
        return torch.cat((values[:, 0], values[:, 1]))

    per_token = stacked(log_probs["tokens"])[:, 1:]
    outputs = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    model: Any = lambda **_: outputs  # noqa: E731
    model.training = True
    figures: dict[str, dict[str, list[float]]] = {"train": defaultdict(list)}
    trainer = SimpleNamespace(
        model=model,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=list(weights),
        loss_weights=list(weights.values()),
        beta=BETA,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics=figures,
        _total_train_tokens=0,
        _tp_size=1,
    )
    mask = stacked(log_probs["mask"])
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "attention_mask": torch.ones(mask.shape, dtype=torch.int64),
        "completion_mask": mask.long(),
        "ref_chosen_logps": log_probs["reference"][:, 0],
        "ref_rejected_logps": log_probs["reference"][:, 1],
    }
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    return float(loss), {name: values[0] for name, values in figures["train"].items() if isinstance(values, list)}


def ours(log_probs: dict[str, Tensor], config: PreferenceLossConfig) -> dict[str, float]:
    """One row for each pair: chosen, then rejected."""
    loss, number, report = summed_pair_loss(
        -log_probs["tokens"].flatten(1),
        loss_mask=log_probs["mask"].flatten(1),
        document_ids=torch.tensor([0] * WIDTH + [1] * WIDTH).repeat(NUM_PAIRS, 1),
        pair_ids=torch.arange(NUM_PAIRS)[:, None],
        reference_log_probs=log_probs["reference"][:, None],
        config=config,
    )
    assert number.item() == NUM_PAIRS
    return {"loss": float(loss) / NUM_PAIRS} | {name: float(total / count) for name, (total, count) in report.items()}


@pytest.mark.parametrize("name", CASES)
def test_trls_losses_are_the_same(log_probs: dict[str, Tensor], name: str) -> None:
    """Ours is rounded to fp32 once, at the end."""
    expected, _ = trl(log_probs, {name: 1.0})
    assert ours(log_probs, CASES[name])["loss"] == pytest.approx(expected, rel=1e-6)


def test_trls_figures_are_the_same(log_probs: dict[str, Tensor]) -> None:
    _, theirs = trl(log_probs, {"sigmoid": 1.0})
    found = ours(log_probs, PreferenceLossConfig(beta=BETA))
    for mine, name in (
        ("rewards/chosen", "rewards/chosen"),
        ("rewards/rejected", "rewards/rejected"),
        ("rewards/margin", "rewards/margins"),
        ("rewards/accuracy", "rewards/accuracies"),
        ("log-probs/chosen", "logps/chosen"),
        ("log-probs/rejected", "logps/rejected"),
    ):
        assert found[mine] == pytest.approx(theirs[name], rel=1e-6), mine


def test_rpos_likelihood_term_is_trls_where_answers_are_equally_long(log_probs: dict[str, Tensor]) -> None:
    """TRL takes the mean over all tokens of a batch, RPO (arXiv:2404.19733, eq. 1) over those of each answer."""
    pair = {name: tensor[2:3].repeat(NUM_PAIRS, *[1] * (tensor.dim() - 1)) for name, tensor in log_probs.items()}
    expected, _ = trl(pair, {"sigmoid": 1.0, "sft": 0.5})
    found = ours(pair, PreferenceLossConfig(beta=BETA, nll_weight=0.5))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
