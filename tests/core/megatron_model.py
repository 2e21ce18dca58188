"""A real Megatron model in a given layout, with canonical weights going in and canonical gradients coming out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ogpsa.sharding.gradients import _model_and_main_params, leaf_optimizers
from tests.core.layouts import Layout
from tests.core.oracle import ModelShape, Tensors, shapes_of

Batch = tuple[Tensor, Tensor, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-grads": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Training:
    """What a megatron-core loop holds."""

    layout: Layout
    shape: ModelShape
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer

    def gradient(self, batch: Batch) -> None:
        """Zero, forward, backward, finalise: the loop's own way of getting a gradient of the token-weighted mean."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        rows = list(zip(*(tensor[rank::size] for tensor in batch), strict=True))
        iterators = [iter(rows) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(rows),
            seq_length=self.shape.positions,
            micro_batch_size=1,
            forward_only=False,
        )


def _forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
    tokens, labels, mask = (tensor[None] for tensor in next(iterator))
    positions = torch.arange(tokens.shape[1])[None]

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (output.float() * mask).sum()
        return total, mask.sum().int(), {"lm loss": torch.stack((total.detach(), mask.sum()))}

    return model(tokens, positions, None, labels=labels), loss


def build(layout: Layout, weights: Tensors, *, optimizer: str = "adam", clip_grad: float = 1.0) -> Training:
    """Initialise model parallelism, build the chunks, load this rank's slices of ``weights``."""
    shape = ModelShape(**layout.model)
    parallel_state.initialize_model_parallel(layout.tp, layout.pp, virtual_pipeline_model_parallel_size=layout.vpp)
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = _transformer_config(layout, shape)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=shape.qk_norm)
    modules = []
    for stage in range(layout.vpp or 1):
        vp = {"ignore_virtual": False, "vp_stage": stage} if layout.vpp else {}
        modules.append(
            GPTModel(
                config,
                spec,
                vocab_size=shape.vocabulary,
                max_sequence_length=shape.positions,
                pre_process=parallel_state.is_pipeline_first_stage(**vp),
                post_process=parallel_state.is_pipeline_last_stage(**vp),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=shape.tied,
                vp_stage=stage if layout.vpp else None,
            )
        )
    for module in modules:
        module.to(DTYPES[layout.precision])
        for param, hf_parts in canonical_parts(module, shape):
            param.data.copy_(_gather_parts(hf_parts, weights))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.precision != "bf16-grads",
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_grad_reduce=layout.overlap,
        bucket_size=2000 if layout.overlap else None,
    )
    chunks = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    if layout.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if layout.vpp else chunks[0].no_sync
    optimizer_config = OptimizerConfig(
        optimizer=optimizer,
        lr=1e-3,
        bf16=layout.precision.startswith("bf16"),
        fp16=layout.precision == "fp16",
        initial_loss_scale=2.0**10,
        params_dtype=DTYPES[layout.precision],
        use_distributed_optimizer=layout.distributed_optimizer,
        clip_grad=clip_grad,
    )
    megatron_optimizer = get_megatron_optimizer(optimizer_config, chunks)
    config.grad_scale_func = megatron_optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return Training(layout, shape, chunks, megatron_optimizer)


def _transformer_config(layout: Layout, shape: ModelShape) -> TransformerConfig:
    dtype = DTYPES[layout.precision]
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=1e-5,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=layout.vpp is None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=True,
    )


# ------------------------------------------------------------------------------------------ canonical tensors

Part = tuple[str, slice | Tensor, slice | Tensor]
"""Hugging Face name, rows and columns of it; parts follow each other along dim 0 of the local parameter."""

ALL = slice(None)


def canonical_parts(module: GPTModel, shape: ModelShape) -> Iterator[tuple[torch.nn.Parameter, list[Part]]]:
    """Each local parameter of a model chunk with the slices of Hugging Face tensors that it is made of."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()

    def share(size: int) -> slice:
        return slice(tp_rank * size // tp_size, (tp_rank + 1) * size // tp_size)

    numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(module.decoder.layers)}
    for name, param in module.named_parameters():
        layer = next((number for prefix, number in numbers.items() if name.startswith(prefix)), None)
        leaf = name if layer is None else name.split(".", 3)[3]
        prefix = f"model.layers.{layer}"
        if leaf == "embedding.word_embeddings.weight":
            yield param, [("model.embed_tokens.weight", share(shape.vocabulary), ALL)]
        elif leaf == "output_layer.weight":
            head = "model.embed_tokens.weight" if shape.tied else "lm_head.weight"
            yield param, [(head, share(shape.vocabulary), ALL)]
        elif leaf == "decoder.final_layernorm.weight":
            yield param, [("model.norm.weight", ALL, ALL)]
        elif leaf == "input_layernorm.weight":
            yield param, [(f"{prefix}.input_layernorm.weight", ALL, ALL)]
        elif leaf == "pre_mlp_layernorm.weight":
            yield param, [(f"{prefix}.post_attention_layernorm.weight", ALL, ALL)]
        elif leaf in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
            yield param, [(f"{prefix}.self_attn.{leaf[15]}_norm.weight", ALL, ALL)]
        elif leaf == "self_attention.linear_proj.weight":
            yield param, [(f"{prefix}.self_attn.o_proj.weight", ALL, share(shape.hidden))]
        elif leaf == "mlp.linear_fc2.weight":
            yield param, [(f"{prefix}.mlp.down_proj.weight", ALL, share(shape.ffn))]
        elif leaf == "mlp.linear_fc1.weight":
            yield param, [(f"{prefix}.mlp.{part}_proj.weight", share(shape.ffn), ALL) for part in ("gate", "up")]
        elif leaf.startswith("self_attention.linear_qkv."):
            yield param, _qkv_parts(shape, f"{prefix}.self_attn", leaf.rsplit(".", 1)[1], share)
        else:
            raise AssertionError(f"the test does not know {name}")


def _qkv_parts(shape: ModelShape, prefix: str, kind: str, share: Callable[[int], slice]) -> list[Part]:
    """Fused rows: for each query group its query heads, its k, its v; tensor parallelism cuts that list evenly."""
    size, per_group = shape.head_size, shape.heads // shape.query_groups
    rows: list[tuple[str, int]] = []
    for group in range(shape.query_groups):
        rows += [("q", group * per_group * size + row) for row in range(per_group * size)]
        rows += [("k", group * size + row) for row in range(size)]
        rows += [("v", group * size + row) for row in range(size)]
    return [(f"{prefix}.{name}_proj.{kind}", slice(row, row + 1), ALL) for name, row in rows[share(len(rows))]]


def _gather_parts(parts: list[Part], tensors: Tensors) -> Tensor:
    return torch.cat(
        [tensors[name][rows, cols] if tensors[name].dim() == 2 else tensors[name][rows] for name, rows, cols in parts]
    )


def canonical_gradient(training: Training, read: Callable[[Tensor], Tensor | None]) -> Tensors:
    """Put the optimizer's gradients of all ranks together as full Hugging Face tensors, fp64.

    Args:
        read: gives the gradient of a tensor that the inner optimizer updates. Copies on several ranks must be equal
            and are averaged; an element that no rank holds fails.
    """
    values = {name: torch.zeros(size, dtype=torch.float64) for name, size in shapes_of(training.shape).items()}
    counts = {name: torch.zeros_like(value) for name, value in values.items()}
    local: dict[torch.nn.Parameter, tuple[Tensor, Tensor]] = {}
    for optimizer in leaf_optimizers(training.optimizer):
        for param, main in _model_and_main_params(optimizer):
            grad = read(main)
            assert grad is not None
            start, stop = 0, param.numel()
            if hasattr(optimizer, "_get_model_param_range_map"):
                shard = optimizer._get_model_param_range_map(param)["param"]
                start, stop = shard.start, shard.end
            value, count = (torch.zeros(param.numel(), dtype=torch.float64) for _ in range(2))
            value[start:stop], count[start:stop] = grad.flatten().double(), 1.0
            local[param] = value.view_as(param), count.view_as(param)
    for chunk in training.chunks:
        for param, parts in canonical_parts(chunk.module, training.shape):
            if param not in local:
                continue
            row = 0
            for name, rows, cols in parts:
                index = (rows, cols) if values[name].dim() == 2 else (rows,)
                stop = row + values[name][index].shape[0]
                values[name][index] += local[param][0][row:stop]
                counts[name][index] += local[param][1][row:stop]
                row = stop
    for name in values:
        dist.all_reduce(values[name])
        dist.all_reduce(counts[name])
        assert counts[name].min() >= 1, f"no rank holds some elements of {name}"
        values[name] /= counts[name]
    return values


def plant(training: Training, tensors: Tensors, scale: float = 1.0) -> None:
    """Put a gradient where ``finalize_model_grads`` leaves one: in Megatron's buffers, each copy alike."""
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
        for param, parts in canonical_parts(chunk.module, training.shape):
            param.main_grad.copy_(scale * _gather_parts(parts, tensors))
    training.optimizer.zero_grad()
