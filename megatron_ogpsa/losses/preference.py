"""Losses on preference pairs: how much more the policy prefers the chosen answer than the reference policy does.

Shape legend: B = rows of the micro-batch, S = sequence, P = pairs that a row has room for, D = documents (2·P). In each
row document 2j is the chosen answer of pair j and document 2j + 1 the rejected one; [..., 2] is (chosen, rejected).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.losses.output import LossOutput

PreferenceLossKind = Literal["sigmoid", "hinge", "ipo"]


@dataclass(frozen=True, kw_only=True)
class PreferenceLossConfig:
    """A loss on the margin h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)).

    Raises:
        UserError: a value that is not possible, by its flag's name.
    """

    kind: PreferenceLossKind = "sigmoid"
    """``sigmoid``: −(1−ε)·log σ(βh) − ε·log σ(−βh) (DPO, arXiv:2305.18290, eq. 7; label smoothing ε as in cDPO).
    ``hinge``: max(0, 1 − βh) (arXiv:2309.06657). ``ipo``: (h − 1/(2β))² (arXiv:2310.12036), of means over an answer's
    tokens: as TRL has it, since the target 1/(2β) does not grow with the answers."""

    beta: float = 0.2
    """Strength of the tie to the reference policy (0.2 in arXiv:2602.07892)."""

    label_smoothing: float = 0.0
    """ε, the share of pairs whose order is taken to be wrong; sigmoid only."""

    length_normalised: bool = False
    """Log-probabilities are means over an answer's tokens, not sums; ``ipo`` always takes means."""

    nll_weight: float = 0.0
    """α of RPO (arXiv:2404.19733, eq. 1): adds α times the chosen answer's mean token loss."""

    @property
    def takes_means(self) -> bool:
        """Whether log-probabilities are divided by the answers' lengths."""
        return self.length_normalised or self.kind == "ipo"

    def __post_init__(self) -> None:
        """Check every value."""
        if self.kind not in get_args(PreferenceLossKind):
            raise UserError(f"--ogpsa-dpo-loss {self.kind}: use {', '.join(get_args(PreferenceLossKind))}")
        if not self.beta > 0:
            raise UserError(f"--ogpsa-dpo-beta {self.beta}: use a number above 0, such as 0.2")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"--ogpsa-dpo-label-smoothing {self.label_smoothing}: use 0 or more and less than 0.5")
        if self.label_smoothing and self.kind != "sigmoid":
            raise UserError(f"--ogpsa-dpo-label-smoothing with --ogpsa-dpo-loss {self.kind}: it belongs to sigmoid")
        if not self.nll_weight >= 0:
            raise UserError(f"--ogpsa-dpo-nll-weight {self.nll_weight}: use 0 or more")


def answer_log_probs(token_loss_BS: Tensor, loss_mask_BS: Tensor, document_ids_BS: Tensor, num_pairs: int) -> Tensor:
    """log π(y|x) = −Σ_t m_t ℓ_t over the tokens of each answer.

    Sums in fp64: the difference of two sums over thousands of tokens is what is learnt from.

    Args:
        token_loss_BS: ℓ, cross-entropy of each label; on a vocabulary-parallel model Megatron's own, so that no rank
            sees all logits.
        loss_mask_BS: m, 1 where the label is a token of the answer.
        document_ids_BS: int64, -1 on padding.
        num_pairs: P.

    Returns:
        fp64 [B, P, 2]; 0 where a row has fewer pairs.
    """
    documents_D = torch.arange(2 * num_pairs, device=document_ids_BS.device)
    # A product and a sum, not a scatter: the same bits each time on a GPU too.
    in_document_BDS = (document_ids_BS[:, None, :] == documents_D[:, None]) * loss_mask_BS[:, None, :].double()
    log_probs_BD = -(in_document_BDS * token_loss_BS.double()[:, None, :]).sum(dim=-1)
    return log_probs_BD.unflatten(-1, (num_pairs, 2))


def answer_lengths(loss_mask_BS: Tensor, document_ids_BS: Tensor, num_pairs: int) -> Tensor:
    """Tokens of each answer, fp64 [B, P, 2]; at least 1, so that absent pairs divide by something."""
    ones_BS = -torch.ones_like(loss_mask_BS)
    return answer_log_probs(ones_BS, loss_mask_BS, document_ids_BS, num_pairs).clamp_min(1.0)


def margin_loss(margin: Tensor, config: PreferenceLossConfig) -> Tensor:
    """The loss of each margin h, elementwise; see :class:`PreferenceLossConfig`."""
    scaled = config.beta * margin
    match config.kind:
        case "sigmoid":
            smoothing = config.label_smoothing
            return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
        case "hinge":
            return torch.relu(1 - scaled)
        case "ipo":
            return (margin - 1 / (2 * config.beta)).square()


def summed_pair_loss(
    token_loss: Tensor,
    *,
    loss_mask: Tensor,
    document_ids: Tensor,
    pair_ids: Tensor,
    reference_log_probs: Tensor,
    config: PreferenceLossConfig,
) -> LossOutput:
    """The sum of the loss over pairs, and their number; divided by Megatron, the mean over the global batch's pairs.

    Args:
        token_loss, loss_mask, document_ids: [B, S].
        pair_ids: int64 [B, P], -1 where a row has fewer pairs.
        reference_log_probs: log π_ref of (chosen, rejected), fp64 [B, P, 2], sums over tokens; anything finite where a
            row has fewer pairs.

    Returns:
        the sum (fp32), the number of pairs (int32), and for the log, each as [sum, number]: the loss; rewards
        β·(log π − log π_ref) of both answers, their margin, how often it is positive; log π of both answers (sums over
        tokens); with ``nll_weight`` the chosen answers' mean token loss.
    """
    exists_BP = pair_ids >= 0
    num_pairs = pair_ids.shape[1]
    log_probs_BP2 = answer_log_probs(token_loss, loss_mask, document_ids, num_pairs)
    lengths_BP2 = answer_lengths(loss_mask, document_ids, num_pairs)
    gain_BP2 = log_probs_BP2 - reference_log_probs
    if config.takes_means:
        gain_BP2 = gain_BP2 / lengths_BP2
    margin_BP = gain_BP2[..., 0] - gain_BP2[..., 1]
    loss_BP = margin_loss(margin_BP, config)
    nll_BP = -log_probs_BP2[..., 0] / lengths_BP2[..., 0]
    if config.nll_weight:
        loss_BP = loss_BP + config.nll_weight * nll_BP
    loss = torch.where(exists_BP, loss_BP, 0.0).sum().float()
    count = exists_BP.sum()

    rewards_BP2 = config.beta * gain_BP2
    figures = {
        "dpo loss": loss_BP,
        "rewards/chosen": rewards_BP2[..., 0],
        "rewards/rejected": rewards_BP2[..., 1],
        "rewards/margin": config.beta * margin_BP,
        "rewards/accuracy": (margin_BP > 0).double(),
        "log-probs/chosen": log_probs_BP2[..., 0],
        "log-probs/rejected": log_probs_BP2[..., 1],
    }
    if config.nll_weight:
        figures["nll chosen"] = nll_BP
    # All at once: each by itself would be some launches more, for which a GPU waits at the end of each micro-batch.
    values_FBP = torch.stack([values_BP.detach() for values_BP in figures.values()])
    totals_F = torch.where(exists_BP, values_FBP, 0.0).sum(dim=(1, 2))
    report_F2 = torch.stack([totals_F, count.double().expand_as(totals_F)], dim=1).float()
    return loss, count.to(torch.int), dict(zip(figures, report_F2, strict=True))


def chosen_mask(loss_mask: Tensor, document_ids: Tensor) -> Tensor:
    """``loss_mask`` without rejected answers: what likelihood of chosen answers alone is taken over."""
    return loss_mask * (document_ids % 2 == 0)
