"""The loss of supervised fine-tuning: cross-entropy summed over supervised tokens, divided by Megatron at the very end."""

from __future__ import annotations

import torch

from megatron_ogpsa.losses.output import LossOutput


def summed_token_loss(token_loss: torch.Tensor, *, loss_mask: torch.Tensor) -> LossOutput:
    """The sum of the loss over supervised tokens, and their number: L = Σ_t m_t ℓ_t, N = Σ_t m_t.

    Divided by Megatron, this is the mean over the supervised tokens of the global batch, however it is cut into
    micro-batches and ranks.

    Args:
        token_loss: ℓ, cross-entropy of each label, any float dtype, [micro-batch, sequence].
        loss_mask: m, 1 where the label is supervised and 0 elsewhere, same shape.

    Returns:
        L (fp32 scalar, differentiable), N (int32 scalar), and what the log reduces: ``{"lm loss": [L, N]}``.
    """
    mask = loss_mask.reshape(-1).float()
    loss = torch.sum(token_loss.reshape(-1).float() * mask)
    num_tokens = mask.sum().detach().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}
