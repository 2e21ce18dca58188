"""What the ranks of the tests of ``agreed`` run; each function returns plain values."""

from __future__ import annotations

import torch.distributed as dist

from megatron_ogpsa.errors import TransientError, UserError
from megatron_ogpsa.integration.ranks.agreement import agreed

_ERRORS = {
    "user": UserError("data.jsonl:3: broken"),
    "transient": TransientError("data.jsonl: away"),
    "internal": KeyError("lost"),
}


def outcome(failing: dict[str, str]) -> tuple[str, str]:
    """The type and message that this rank sees when ranks fail, and that it can communicate after it.

    Args:
        failing: rank → kind of its error.
    """

    def action() -> int:
        if kind := failing.get(str(dist.get_rank())):
            raise _ERRORS[kind]
        return dist.get_rank()

    try:
        seen = ("result", str(agreed(action)))
    except (UserError, RuntimeError) as error:
        seen = (type(error).__name__, str(error))
    dist.barrier()  # a rank that had been left behind in agreed() would not come here
    return seen
