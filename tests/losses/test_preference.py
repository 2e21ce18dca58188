"""Preference losses against their definitions, on whole logits in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.losses.preference import (
    PreferenceLossConfig,
    answer_log_probs,
    chosen_mask,
    margin_loss,
    summed_pair_loss,
)

DOCUMENTS = [[0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 1, 1, 2, 2, 3, 3]]
MASK = [[0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1, 0, 1]]
PAIRS = [[4, -1], [7, 2]]
VOCABULARY = 11


@pytest.fixture
def rows() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(2, 8, VOCABULARY, dtype=torch.float64, generator=generator),
        "labels": torch.randint(VOCABULARY, (2, 8), generator=generator),
        "loss_mask": torch.tensor(MASK, dtype=torch.float32),
        "document_ids": torch.tensor(DOCUMENTS),
        "pair_ids": torch.tensor(PAIRS),
        "reference": torch.randn(2, 2, 2, dtype=torch.float64, generator=generator),
    }


def token_loss(rows: dict[str, Tensor]) -> Tensor:
    return -rows["logits"].log_softmax(-1).gather(-1, rows["labels"][..., None]).squeeze(-1)


def pairs_by_eye(rows: dict[str, Tensor]) -> list[tuple[float, float, float, float, int, int]]:
    """(log π chosen, log π rejected, log π_ref chosen, log π_ref rejected, tokens of both) of the three pairs."""
    loss = token_loss(rows).tolist()
    found = []
    for row, pair in ((0, 0), (1, 0), (1, 1)):
        tokens = [
            [-loss[row][s] for s in range(8) if DOCUMENTS[row][s] == 2 * pair + side and MASK[row][s]]
            for side in (0, 1)
        ]
        reference = rows["reference"][row, pair].tolist()
        found.append((sum(tokens[0]), sum(tokens[1]), *reference, len(tokens[0]), len(tokens[1])))
    return found


def run(rows: dict[str, Tensor], config: PreferenceLossConfig, losses: Tensor | None = None):  # type: ignore[no-untyped-def]
    return summed_pair_loss(
        token_loss(rows) if losses is None else losses,
        loss_mask=rows["loss_mask"],
        document_ids=rows["document_ids"],
        pair_ids=rows["pair_ids"],
        reference_log_probs=rows["reference"],
        config=config,
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


DEFINITIONS = {
    "sigmoid": (PreferenceLossConfig(beta=0.7), lambda h: -math.log(sigma(0.7 * h))),
    "smoothed": (
        PreferenceLossConfig(beta=0.7, label_smoothing=0.1),
        lambda h: -0.9 * math.log(sigma(0.7 * h)) - 0.1 * math.log(sigma(-0.7 * h)),
    ),
    "hinge": (PreferenceLossConfig(kind="hinge", beta=0.7), lambda h: max(0.0, 1 - 0.7 * h)),
    "ipo": (PreferenceLossConfig(kind="ipo", beta=0.7), lambda h: (h - 1 / 1.4) ** 2),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("length_normalised", [False, True])
def test_the_loss_is_its_definition_summed_over_pairs(
    rows: dict[str, Tensor], name: str, length_normalised: bool
) -> None:
    config, definition = DEFINITIONS[name]
    config = PreferenceLossConfig(**(vars(config) | {"length_normalised": length_normalised}))
    expected, rewards = 0.0, []
    for w, l, ref_w, ref_l, n_w, n_l in pairs_by_eye(rows):  # noqa: E741
        n_w, n_l = (n_w, n_l) if length_normalised or name == "ipo" else (1, 1)
        rewards.append((0.7 * (w - ref_w) / n_w, 0.7 * (l - ref_l) / n_l))
        expected += definition((w - ref_w) / n_w - (l - ref_l) / n_l)
    loss, number, report = run(rows, config)
    assert number.dtype == torch.int32
    assert number.item() == 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # the sum is rounded to fp32 once
    assert report["dpo loss"].tolist() == pytest.approx([expected, 3.0], rel=1e-6)
    assert report["rewards/chosen"][0].item() == pytest.approx(sum(w for w, _ in rewards), rel=1e-6)
    assert report["rewards/rejected"][0].item() == pytest.approx(sum(l for _, l in rewards), rel=1e-6)  # noqa: E741
    assert report["rewards/accuracy"].tolist() == [sum(w > l for w, l in rewards), 3.0]  # noqa: E741


def test_rpo_adds_the_chosen_answers_mean_token_loss(rows: dict[str, Tensor]) -> None:
    plain, _, _ = run(rows, PreferenceLossConfig())
    added, _, report = run(rows, PreferenceLossConfig(nll_weight=0.5))
    nll = sum(-w / n_w for w, _, _, _, n_w, _ in pairs_by_eye(rows))
    assert added.item() - plain.item() == pytest.approx(0.5 * nll, rel=1e-5)
    assert report["nll chosen"][0].item() == pytest.approx(nll, rel=1e-6)


def test_the_gradient_is_that_of_the_definition(rows: dict[str, Tensor]) -> None:
    """d/dℓ_t of −log σ(βh): β·σ(−βh) on chosen tokens, minus that on rejected ones, nothing elsewhere."""
    losses = token_loss(rows).requires_grad_()
    loss, _, _ = run(rows, PreferenceLossConfig(beta=0.7), losses)
    loss.backward()
    expected = torch.zeros(2, 8, dtype=torch.float64)
    for (row, pair), (w, l, ref_w, ref_l, _, _) in zip(((0, 0), (1, 0), (1, 1)), pairs_by_eye(rows), strict=True):  # noqa: E741
        weight = 0.7 * sigma(-0.7 * ((w - ref_w) - (l - ref_l)))
        for s in range(8):
            side = DOCUMENTS[row][s] - 2 * pair
            if MASK[row][s] and side in (0, 1):
                expected[row, s] = weight if side == 0 else -weight
    assert losses.grad is not None
    torch.testing.assert_close(losses.grad, expected, rtol=1e-6, atol=0)


def test_the_reference_policy_itself_has_no_margin(rows: dict[str, Tensor]) -> None:
    losses = token_loss(rows).float()
    rows["reference"] = answer_log_probs(losses, rows["loss_mask"], rows["document_ids"], 2)
    loss, number, report = run(rows, PreferenceLossConfig(), losses)
    assert loss.item() / number.item() == pytest.approx(math.log(2), rel=1e-7)
    assert report["rewards/margin"][0].item() == 0.0


def test_rows_without_pairs_add_nothing(rows: dict[str, Tensor]) -> None:
    rows["pair_ids"] = torch.full((2, 2), -1)
    rows["reference"] = torch.full((2, 2, 2), 1e30, dtype=torch.float64)
    losses = token_loss(rows).requires_grad_()
    loss, number, _ = run(rows, PreferenceLossConfig(), losses)
    loss.backward()
    assert (loss.item(), number.item()) == (0.0, 0)
    assert losses.grad is not None
    assert not losses.grad.any()


def test_chosen_answers_alone() -> None:
    mask = chosen_mask(torch.tensor(MASK, dtype=torch.float32), torch.tensor(DOCUMENTS))
    assert mask.tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 1, 0, 0]]


def test_far_margins_stay_finite() -> None:
    margins = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    assert margin_loss(margins, PreferenceLossConfig()).tolist() == pytest.approx([0.2e6, 0.0])


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"kind": "kto"}, "--ogpsa-dpo-loss kto"),
        ({"beta": 0.0}, "--ogpsa-dpo-beta"),
        ({"beta": math.nan}, "--ogpsa-dpo-beta"),
        ({"label_smoothing": 0.5}, "--ogpsa-dpo-label-smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "--ogpsa-dpo-label-smoothing"),
        ({"nll_weight": -1.0}, "--ogpsa-dpo-nll-weight"),
    ],
)
def test_impossible_values_are_refused_by_flag(values: dict[str, object], flag: str) -> None:
    with pytest.raises(UserError, match=f"^{flag}"):
        PreferenceLossConfig(**values)  # type: ignore[arg-type]
