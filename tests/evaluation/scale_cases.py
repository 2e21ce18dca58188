"""What ranks run to show who looks for FP8 scales."""

from __future__ import annotations

from argparse import Namespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.checkpoints import loaded_model


def scales_on(ranks: list[int]) -> str:
    """What a rank says of a checkpoint that has given only ``ranks`` scales; empty if nothing."""
    model = loaded_model.LoadedModel(Namespace(fp8_recipe="delayed"), torch.nn.Identity())
    with (
        patch.object(loaded_model, "starts_without_scales", lambda chunks: True),
        patch.object(loaded_model, "has_forward_scales", lambda chunks: dist.get_rank() in ranks),
    ):
        try:
            model._require_scales("--load", "run")
        except UserError as error:
            return str(error)
    return ""
