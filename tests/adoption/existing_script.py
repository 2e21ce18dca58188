"""A training script as users of Megatron have it, without this project; the README's diff is applied to its text."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.global_vars import get_args

Batch = dict[str, torch.Tensor]


class Rows(torch.utils.data.Dataset[Batch]):
    """Rows of random tokens, each a function of its index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        args = get_args()
        generator = torch.Generator().manual_seed(int(index))
        row = torch.randint(0, 100, (args.seq_length + 1,), generator=generator)
        return {"tokens": row[:-1], "labels": row[1:]}


def datasets(num_samples: tuple[int, int, int], vp_stage: int | None = None) -> tuple[Rows, None, None]:
    return Rows(num_samples[0]), None, None


def mean_loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().mean()
    return loss, {"lm loss": loss.detach()}


def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., object]]:
    batch = next(iterator)
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"]), partial(mean_loss)


if __name__ == "__main__":
    datasets.is_distributed = True
    args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, datasets, ModelType.encoder_or_decoder, forward_step)
