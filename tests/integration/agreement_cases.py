"""What the ranks of the tests of ``agreed`` run; each function returns plain values."""

from __future__ import annotations

import torch.distributed as dist

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.agreement import agreed


def outcome(failing: list[int], kind: str) -> tuple[str, str]:
    """The type and message that this rank sees when the ranks ``failing`` fail, and that it can communicate after it."""

    def action() -> int:
        if dist.get_rank() in failing:
            raise UserError("data.jsonl:3: broken") if kind == "user" else KeyError("lost")
        return dist.get_rank()

    try:
        seen = ("result", str(agreed(action)))
    except (UserError, RuntimeError) as error:
        seen = (type(error).__name__, str(error))
    dist.barrier()  # a rank that had been left behind in agreed() would not come here
    return seen
