"""A real Megatron model in a given layout, with canonical weights going in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from tests.core.canonical import canonical_parts, gather_parts
from tests.core.context_parallel import GatheringAttention, own_part
from tests.core.layouts import Layout
from tests.core.oracle import ModelShape, Tensors, routing_bias

Batch = tuple[Tensor, Tensor, Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16-grads": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Training:
    """What a megatron-core loop holds."""

    layout: Layout
    shape: ModelShape
    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    parts: dict[torch.nn.Parameter, Any] | None = field(default=None, repr=False)

    def gradient(self, batch: Batch) -> None:
        """Zero, forward, backward, finalise: the loop's own way of getting a gradient of the token-weighted mean."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = local_micro_batches(self.layout, batch)
        iterators = [iter(micro_batches) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=len(micro_batches),
            seq_length=self.shape.positions,
            micro_batch_size=self.layout.micro_batch,
            forward_only=False,
        )


def local_micro_batches(layout: Layout, batch: Batch) -> list[Batch]:
    """This rank's share of the rows, and with context parallelism of the positions, in micro-batches."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = own_part({str(index): tensor[rank::size] for index, tensor in enumerate(batch)})
    return list(zip(*(tensor.split(layout.micro_batch) for tensor in rows.values()), strict=True))


def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable[[Tensor], object]]:
    tokens, labels, mask = next(iterator)
    whole_length = tokens.shape[1] * parallel_state.get_context_parallel_world_size()
    positions = own_part({"positions": torch.arange(whole_length).repeat(tokens.shape[0], 1)})["positions"]

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = (output.float() * mask).sum()
        return total, mask.sum().int(), {"lm loss": torch.stack((total.detach(), mask.sum()))}

    return model(tokens, positions, None, labels=labels), loss


def build(
    layout: Layout,
    weights: Tensors,
    *,
    optimizer: str = "adam",
    clip_grad: float = 1.0,
    lr: float = 1e-3,
    per_token: bool = True,
    initial_loss_scale: float = 2.0**10,
) -> Training:
    """Initialise model parallelism, build the chunks, load this rank's slices of ``weights``.

    ``per_token``: Megatron's ``calculate_per_token_loss``; without it training takes a mean of micro-batches' means.
    """
    shape = ModelShape(**layout.model)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_distributed_optimizer_instances=layout.instances,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = _transformer_config(layout, shape)
    config.calculate_per_token_loss = per_token
    modules = [_module(layout, shape, config, stage) for stage in range(layout.vpp or 1)]
    for module in modules:
        module.to(DTYPES[layout.precision])
        for param, parts in canonical_parts(module, shape):
            values = gather_parts(parts, weights)
            with torch.no_grad():
                param.copy_(values)
            if layout.fp8_params and hasattr(param, "get_high_precision_init_val"):
                param.get_high_precision_init_val().data.copy_(values)  # what main parameters are made of
            param.requires_grad_(not all(layout.is_frozen(name) for name, *_ in parts))
        for name, buffer in module.named_buffers():
            if name.endswith("router.expert_bias"):
                buffer.copy_(routing_bias(shape))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.precision != "bf16-grads",
        use_distributed_optimizer=layout.distributed_optimizer,
        num_distributed_optimizer_instances=layout.instances,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap_param_gather,
        fp8_param_gather=layout.fp8_params,
        bucket_size=2000 if layout.overlap else None,
    )
    chunks = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    if layout.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks] if layout.vpp else chunks[0].no_sync
    optimizer_config = OptimizerConfig(
        optimizer=optimizer,
        lr=lr,
        bf16=layout.precision.startswith("bf16"),
        fp16=layout.precision == "fp16",
        initial_loss_scale=initial_loss_scale,
        params_dtype=DTYPES[layout.precision],
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
        use_precision_aware_optimizer=layout.precision_aware,
        optimizer_cpu_offload=layout.cpu_offload,
        optimizer_offload_fraction=1.0 if layout.cpu_offload else 0.0,
        clip_grad=clip_grad,
    )
    megatron_optimizer = get_megatron_optimizer(optimizer_config, chunks)
    config.grad_scale_func = megatron_optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return Training(layout, shape, chunks, megatron_optimizer)


class SequenceParallelNorm(torch.nn.RMSNorm):
    """Megatron's torch norm refuses sequence parallelism; this one marks its weight, as Transformer Engine's does.

    The mark makes ``finalize_model_grads`` sum the weight's gradient over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[union-attr]


def _module(layout: Layout, shape: ModelShape, config: TransformerConfig, stage: int) -> GPTModel:
    vp_stage = stage if layout.vpp else None
    first = get_transformer_layer_offset(config, vp_stage)
    specs = [
        _layer_spec(layout, shape, is_dense=layer < shape.dense_layers)
        for layer in range(first, first + get_num_layers_to_build(config, vp_stage))
    ]
    norm = _norm(layout)
    vp = {"ignore_virtual": False, "vp_stage": stage} if layout.vpp else {}
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm),  # type: ignore[arg-type]
        vocab_size=shape.vocabulary,
        max_sequence_length=shape.positions,
        pre_process=parallel_state.is_pipeline_first_stage(**vp),
        post_process=parallel_state.is_pipeline_last_stage(**vp),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tied,
        vp_stage=vp_stage,
    )


def _norm(layout: Layout) -> Any:
    if layout.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    return SequenceParallelNorm if layout.sequence_parallel else WrappedTorchNorm


def _layer_spec(layout: Layout, shape: ModelShape, *, is_dense: bool) -> ModuleSpec:
    num_experts = None if is_dense else shape.experts or None
    if layout.transformer_engine:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=num_experts,
            moe_grouped_gemm=num_experts is not None,
            qk_layernorm=shape.qk_norm or shape.latent,
            multi_latent_attention=shape.latent,
            mla_down_proj_fusion=layout.fused_down,
        )
    spec = get_gpt_layer_local_spec(
        num_experts=num_experts,
        normalization="RMSNorm",
        qk_layernorm=shape.qk_norm or shape.latent,
        multi_latent_attention=shape.latent,
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    if layout.cp > 1 or shape.latent:
        attention.core_attention = GatheringAttention
    if layout.sequence_parallel:
        layer.input_layernorm = layer.pre_mlp_layernorm = SequenceParallelNorm
        if shape.qk_norm:
            attention.q_layernorm = attention.k_layernorm = SequenceParallelNorm
        if shape.latent:
            attention.q_layernorm = attention.kv_layernorm = SequenceParallelNorm
    return spec


def _transformer_config(layout: Layout, shape: ModelShape) -> TransformerConfig:
    dtype = DTYPES[layout.precision]
    return (MLATransformerConfig if shape.latent else TransformerConfig)(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=1e-5,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=shape.linear_bias,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm or shape.latent,
        softmax_type="learnable" if shape.sinks else "vanilla",
        **_latent_settings(layout, shape),
        hidden_dropout=layout.dropout,
        attention_dropout=layout.dropout,
        use_cpu_initialization=not layout.transformer_engine,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **_fp8_settings(layout),
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity="full" if layout.recompute else None,
        recompute_method="uniform" if layout.recompute else None,
        recompute_num_layers=1 if layout.recompute else None,
        **_expert_settings(layout, shape),
        overlap_p2p_comm=layout.vpp is not None,
        batch_p2p_comm=layout.vpp is None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True,
    )


def _latent_settings(layout: Layout, shape: ModelShape) -> dict[str, Any]:
    if not shape.latent:
        return {}
    return {
        "q_lora_rank": shape.q_rank,
        "kv_lora_rank": shape.kv_rank,
        "qk_head_dim": shape.head_size,
        "qk_pos_emb_head_dim": shape.rotary_size,
        "v_head_dim": shape.head_size,
        "rope_type": "rope",
        "mla_down_proj_fusion": layout.fused_down,
    }


def _fp8_settings(layout: Layout) -> dict[str, Any]:
    if layout.fp8 is None:
        return {}
    settings = {"fp8": layout.fp8_format, "fp8_recipe": layout.fp8, "fp8_param": layout.fp8_params}
    return settings | {"fp8_amax_history_len": 4}


def _expert_settings(layout: Layout, shape: ModelShape) -> dict[str, Any]:
    if not shape.experts:
        return {}
    return {
        "num_moe_experts": shape.experts,
        "moe_layer_freq": [int(layer >= shape.dense_layers) for layer in range(shape.num_layers)],
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
        "moe_shared_expert_gate": shape.shared_gate,
        "moe_router_topk": shape.top_k,
        "moe_router_score_function": "sigmoid" if shape.routing_bias else "softmax",
        "moe_router_enable_expert_bias": shape.routing_bias,
        "moe_router_bias_update_rate": 0.1 if layout.balancing else 0.0,  # the oracle's bias stays where it is
        "moe_router_load_balancing_type": "aux_loss" if layout.balancing else "none",
        "moe_aux_loss_coeff": 0.1 if layout.balancing else 0.0,
        "moe_grouped_gemm": layout.transformer_engine,
        "moe_token_dispatcher_type": "allgather",  # gloo has no all-to-all
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp if layout.etp is None else layout.etp,
    }
