"""Jobs on real ranks: a converted checkpoint, loaded by Megatron into a model built from the flags beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.integration.arguments.parser import build_parser
from megatron_ogpsa.integration.training import prepare_megatron
from megatron_ogpsa.planning.arguments import megatron_arguments
from tests.conversion.models import SEQUENCE_LENGTH, tokens


def logits(folders: dict[str, str], **layout: Any) -> dict[str, dict[str, Tensor]]:
    """Of each model: logits [rows, positions, vocabulary] and rotary frequencies, on the last stage.

    Args:
        layout: sizes ``tp``, ``pp``, ``ep``; ``grouped``: experts as one product, in Transformer Engine.
    """
    _initialize(**layout)
    return {name: _logits_of(Path(folder), layout) for name, folder in folders.items()}


def saved(folders: dict[str, str], target: str, each_layer: bool = False, **layout: Any) -> None:
    """Load each model and save it as Megatron saves a run's first iteration in this layout, in ``target``/NAME.

    Args:
        each_layer: under keys of its own, as where ``--moe-layer-freq`` is a list.
    """
    from megatron.core import dist_checkpointing

    _initialize(**layout)
    for name, folder in folders.items():
        args = _arguments(Path(folder), layout)
        model, content = loaded_model(Path(folder), args)
        if each_layer:
            model.decoder.config.moe_layer_freq = [1] * args.num_layers
        state = {"args": args, "model": _sharded(model, content)}
        path = Path(target, name, "iter_0000001")
        path.mkdir(parents=True, exist_ok=True)
        with patch("megatron.training.get_args", return_value=args):  # asked how it saves
            dist_checkpointing.save(state, str(path), content_metadata=content)


def _initialize(tp: int = 1, pp: int = 1, ep: int = 1, grouped: bool = False) -> None:
    from megatron.core import parallel_state, tensor_parallel

    prepare_megatron()
    parallel_state.initialize_model_parallel(tp, pp, expert_model_parallel_size=ep)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _logits_of(folder: Path, layout: dict[str, Any]) -> dict[str, Tensor]:
    model, _ = loaded_model(folder, _arguments(folder, layout))
    hidden = _stages(model)
    if hidden is None:
        return {}
    rotary = model.rotary_pos_emb
    inv_freq = rotary.inv_freq / (rotary.seq_len_interpolation_factor or 1)
    return {"logits": _whole_vocabulary(hidden), "inv_freq": inv_freq}


def loaded_model(folder: Path, args: Any) -> tuple[Any, dict[str, Any]]:
    """This rank's part of the model in fp32, with the checkpoint's weights; how these are laid out in it."""
    from megatron.core import dist_checkpointing
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    model = GPTModelBuilder(gpt_config_from_args(args)).build_model(ProcessGroupCollection.use_mpu_process_groups())
    with torch.no_grad():
        for param in model.parameters():
            assert param.dtype == torch.float32
            param.fill_(torch.nan)  # what the checkpoint does not fill must show
    release = str(folder / "release")
    content = dist_checkpointing.load_content_metadata(release)
    state = dist_checkpointing.load({"model": _sharded(model, content)}, release)
    model.load_state_dict(state["model"])
    return model.eval(), content


def _sharded(model: Any, content: dict[str, Any]) -> Any:
    return model.sharded_state_dict(metadata=content | {"dp_cp_group": _data_parallel_group()})


def _arguments(folder: Path, layout: dict[str, Any]) -> Any:
    flags = ConfigFile.read(folder / "model.yaml").as_flags(build_parser(), _layout_flags(folder, **layout))
    return megatron_arguments(flags, dist.get_world_size())


def _layout_flags(folder: Path, tp: int = 1, pp: int = 1, ep: int = 1, grouped: bool = False) -> list[str]:
    flags = (
        f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} --expert-model-parallel-size {ep} "
        f"--seq-length {SEQUENCE_LENGTH} --micro-batch-size 2 --train-iters 1 --lr 1e-3"
    ).split()
    if "vocab-size: 101" in (folder / "model.yaml").read_text(encoding="utf-8"):
        flags += ["--padded-vocab-size", "104"]
    return [*flags, "--moe-grouped-gemm"] if grouped else flags


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
