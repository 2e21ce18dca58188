"""The loss of supervised fine-tuning: cross-entropy summed over supervised tokens, divided by Megatron at the very end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[torch.Tensor], LossOutput]


def summed_token_loss(token_loss: torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
    """The sum of the loss over supervised tokens, and their number: L = Σ_t m_t ℓ_t, N = Σ_t m_t.

    With ``--calculate-per-token-loss`` Megatron adds both over micro-batches and data-parallel ranks and divides the
    gradient once (``megatron/core/distributed/finalize_model_grads.py``): the mean over the supervised tokens of the
    global batch, however it is cut into micro-batches and ranks.

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


def training_loss(token_loss: torch.Tensor, loss_mask: torch.Tensor) -> LossOutput:
    """:func:`summed_token_loss` under the watch of Megatron's rerun state machine.

    The machine stops a run whose local loss is not finite (``--no-check-for-nan-in-loss-and-grad`` switches that off). It
    accepts results only inside Megatron's own training step, so passes outside it use the plain function.
    """
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from megatron.training import get_args

    output = summed_token_loss(token_loss, loss_mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for name, is_bad in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            get_rerun_state_machine().validate_result(
                result=output[0],
                rejection_func=is_bad,
                message=f"found {name} in local forward loss calculation",
                tolerance=0.0,  # the forward pass is deterministic
                fatal=True,
            )
    return output


def bind_loss(loss_mask: torch.Tensor, *, validate: bool) -> LossFunction:
    """The loss of one micro-batch as a function of the model's output, with or without validation of the result."""
    return partial(training_loss if validate else summed_token_loss, loss_mask=loss_mask)
