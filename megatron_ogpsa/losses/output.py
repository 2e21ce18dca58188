"""What a loss function gives Megatron, and the watch on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""A sum (scalar, differentiable), the number that it is a sum of (int32 scalar), and what the log reduces: for each name
``[sum, number]``. With ``--calculate-per-token-loss`` Megatron adds both over micro-batches and data-parallel ranks and
divides the gradient once (``megatron/core/distributed/finalize_model_grads.py``)."""

LossFunction = Callable[[torch.Tensor], LossOutput]
"""From the model's output on the last pipeline stage, the loss of each token [micro-batch, sequence]."""


def validated(loss: LossFunction) -> LossFunction:
    """``loss`` under the watch of Megatron's rerun state machine.

    The machine stops a run whose local loss is not finite (``--no-check-for-nan-in-loss-and-grad`` switches that off). It
    accepts results only inside Megatron's own training step, so passes outside it use the plain function.
    """

    def validated_loss(token_loss: torch.Tensor) -> LossOutput:
        from megatron.core.rerun_state_machine import get_rerun_state_machine
        from megatron.training import get_args

        output = loss(token_loss)
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

    return validated_loss
