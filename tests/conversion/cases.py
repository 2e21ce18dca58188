"""Jobs on real ranks: a converted checkpoint, loaded by Megatron into a model built from the flags beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa.cli.config_file import ConfigFile
from megatron_ogpsa.integration.arguments import build_parser
from megatron_ogpsa.integration.training import prepare_megatron
from megatron_ogpsa.planning.arguments import megatron_arguments
from tests.conversion.models import SEQUENCE_LENGTH, tokens


def logits(folders: dict[str, str], tp: int = 1, pp: int = 1) -> dict[str, dict[str, Tensor]]:
    """Of each model: logits [rows, positions, vocabulary] and rotary frequencies, on the last stage."""
    from megatron.core import parallel_state, tensor_parallel

    prepare_megatron()
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return {name: _logits_of(Path(folder), tp, pp) for name, folder in folders.items()}


def _logits_of(folder: Path, tp: int, pp: int) -> dict[str, Tensor]:
    model = loaded_model(folder, tp, pp)
    hidden = _stages(model)
    if hidden is None:
        return {}
    return {"logits": _whole_vocabulary(hidden), "inv_freq": model.rotary_pos_emb.inv_freq}


def loaded_model(folder: Path, tp: int, pp: int) -> Any:
    """This rank's part of the model, with the checkpoint's weights."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    flags = ConfigFile.read(folder / "model.yaml").as_flags(build_parser(), _layout_flags(folder, tp, pp))
    args = megatron_arguments(flags, dist.get_world_size())
    model = GPTModelBuilder(gpt_config_from_args(args)).build_model(ProcessGroupCollection.use_mpu_process_groups())
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(torch.nan)  # what the checkpoint does not fill must show
    release = str(folder / "release")
    content = dist_checkpointing.load_content_metadata(release)
    groups = {"dp_cp_group": _data_parallel_group()}
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=content | groups)}, release)
    model.load_state_dict(state["model"])
    return model.eval()


def _layout_flags(folder: Path, tp: int, pp: int) -> list[str]:
    flags = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --seq-length {SEQUENCE_LENGTH} "
        "--micro-batch-size 2 --train-iters 1 --lr 1e-3"
    ).split()
    if "vocab-size: 101" in (folder / "model.yaml").read_text(encoding="utf-8"):
        flags += ["--padded-vocab-size", "104"]
    return flags


def _data_parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@torch.no_grad()
def _stages(model: Any) -> Tensor | None:
    """Run the stages one after the other; the last one's output [rows, positions, vocabulary / TP], elsewhere None."""
    from megatron.core import parallel_state

    positions = torch.arange(SEQUENCE_LENGTH).repeat(2, 1)
    shape = (SEQUENCE_LENGTH, 2, model.config.hidden_size)
    if not parallel_state.is_pipeline_first_stage():
        received = torch.empty(shape)
        dist.recv(received, src=dist.get_rank() - 1)
        model.set_input_tensor(received)
    output = model(tokens(), positions, None)
    if parallel_state.is_pipeline_last_stage():
        return output
    dist.send(output.contiguous(), dst=dist.get_rank() + 1)
    return None


def _whole_vocabulary(local: Tensor) -> Tensor:
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local.contiguous(), group=group)
    return torch.cat(parts, dim=-1)
