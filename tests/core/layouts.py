"""Layouts as data: a new one is one line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

ROWS = 8
"""Of a batch, on all data-parallel ranks together."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is sharded and trained, and what of the model matters for it.

    Attributes:
        tp, pp, vpp, cp, dp: sizes of the mesh axes; vpp is the number of model chunks per rank.
        ep, etp: sizes of the experts' axes, which divide tp·cp·dp; etp is tp unless it is given.
        sequence_parallel: split the activations outside attention and MLP over the tensor-parallel ranks.
        distributed_optimizer: shard optimizer state over data parallelism.
        instances: of the distributed optimizer, each with a whole copy of the optimizer state.
        overlap: reduce gradients bucket by bucket during the backward pass.
        overlap_param_gather: gather the parameters that a step changed during the next forward pass.
        first_stage_layers: layers of the first pipeline stage; the others share the rest evenly.
        micro_batches: that a pass is cut into on each data-parallel rank: two, as gradients are to be accumulated; with
            pipeline parallelism four, so that its schedule comes to its steady state.
        recompute: compute activations again in the backward pass.
        dropout: probability, after embedding, attention and MLP and on the attention's weights.
        balancing: auxiliary losses balance the experts, and with ``routing_bias`` each pass moves the bias.
        frozen: a pattern found in the Hugging Face names of tensors that are not trained.
        precision: of parameters and gradients: fp32; bf16 with fp32 gradients; bf16 with bf16 gradients; fp16.
        precision_aware: keep gradients in the dtype of Megatron's buffer up to the inner optimizer.
        cpu_offload: keep optimizer state in host memory.
        transformer_engine: build the layers of Transformer Engine's modules, where a process has it; experts are grouped.
        fused_down: hold the projections to latent vectors in one parameter.
        fp8: recipe of their products, for models in bf16.
        fp8_format: E4M3 for all, or "hybrid", E5M2 for gradients.
        fp8_params: hold the layers' weights in FP8.
        model: what differs from the default ``ModelShape``.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    sequence_parallel: bool = False
    distributed_optimizer: bool = True
    instances: int = 1
    overlap: bool = False
    overlap_param_gather: bool = False
    first_stage_layers: int | None = None
    micro_batches: int | None = None
    recompute: bool = False
    dropout: float = 0.0
    balancing: bool = False
    frozen: str | None = None
    precision: str = "fp32"
    precision_aware: bool = False
    cpu_offload: bool = False
    transformer_engine: bool = False
    fused_down: bool = False
    fp8: str | None = None
    fp8_format: str = "hybrid"
    fp8_params: bool = False
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def micro_batch(self) -> int:
        """Rows of a micro-batch."""
        return ROWS // self.dp // (self.micro_batches or (4 if self.pp > 1 else 2))

    def is_frozen(self, name: str) -> bool:
        """Whether the Hugging Face tensor ``name`` is not trained."""
        return self.frozen is not None and re.search(self.frozen, name) is not None


MOE: dict[str, Any] = {"experts": 4, "shared_ffn": 24}
LATENT: dict[str, Any] = {"latent": True, "query_groups": 4}

LAYOUTS: dict[str, Layout] = {
    "tp2": Layout(tp=2),
    "pp2": Layout(pp=2),
    "dp2": Layout(dp=2),
    "dp2-overlap": Layout(dp=2, overlap=True),
    "dp2-plain": Layout(dp=2, distributed_optimizer=False),
    "tp2-plain": Layout(tp=2, distributed_optimizer=False),
    "tp2-mqa": Layout(tp=2, model={"query_groups": 1}),
    "tp2-qkv-bias": Layout(tp=2, model={"qkv_bias": True, "qk_norm": True}),
    "tp2-sinks": Layout(tp=2, model={"sinks": True}),
    "tp2-sinks-plain": Layout(tp=2, distributed_optimizer=False, model={"sinks": True}),
    "tp2-tied": Layout(tp=2, model={"tied": True}),
    "pp2-tied": Layout(pp=2, model={"tied": True}),
    "tp2-pp2": Layout(tp=2, pp=2),
    "tp2-dp2": Layout(tp=2, dp=2),
    "tp2-dp2-plain": Layout(tp=2, dp=2, distributed_optimizer=False),
    "pp2-vpp2-dp2": Layout(pp=2, vpp=2, dp=2),
    "pp2-dp2-tied": Layout(pp=2, dp=2, model={"tied": True}),
    # experts
    "ep2": Layout(dp=2, ep=2, model=MOE),
    "ep2-plain": Layout(dp=2, ep=2, distributed_optimizer=False, model=MOE),
    "ep2-dp2": Layout(dp=4, ep=2, model=MOE),
    "ep2-dp2-plain": Layout(dp=4, ep=2, distributed_optimizer=False, model=MOE),
    "dp2-etp2": Layout(dp=2, etp=2, model=MOE),
    "ep2-tp2": Layout(tp=2, ep=2, etp=1, sequence_parallel=True, model=MOE),
    "ep2-tp2-etp2": Layout(tp=2, dp=2, ep=2, etp=2, sequence_parallel=True, model=MOE),
    "ep2-tp2-etp2-plain": Layout(
        tp=2, dp=2, ep=2, etp=2, sequence_parallel=True, distributed_optimizer=False, model=MOE
    ),
    "tp2-moe": Layout(tp=2, sequence_parallel=True, model=MOE | {"shared_gate": True}),
    "ep2-pp2-dense-stage": Layout(pp=2, dp=2, ep=2, distributed_optimizer=False, model=MOE | {"dense_layers": 2}),
    "ep2-bias": Layout(dp=2, ep=2, model={"experts": 4, "linear_bias": True}),
    "pp2-latent": Layout(pp=2, dp=2, model=LATENT | MOE),
    "ep2-latent-plain": Layout(dp=2, ep=2, distributed_optimizer=False, model=LATENT | MOE),
    "ep2-sigmoid-bias": Layout(dp=2, ep=2, model=MOE | {"routing_bias": True}),
    # what a training run switches on besides
    "dp2-micro-batch": Layout(dp=2, micro_batches=4),
    "dp2-gather": Layout(dp=2, overlap=True, overlap_param_gather=True),
    "dp2-frozen": Layout(dp=2, frozen=r"embed_tokens|layers\.1\.|norm"),
    "tp2-frozen-plain": Layout(tp=2, distributed_optimizer=False, frozen=r"mlp|q_norm", model={"qk_norm": True}),
    "pp2-frozen-stage": Layout(pp=2, frozen=r"layers\.[01]\.|embed_tokens"),
    "pp2-frozen-last-stage-plain": Layout(
        pp=2, frozen=r"layers\.[23]\.|model\.norm|lm_head", distributed_optimizer=False
    ),
    "ep2-frozen-experts": Layout(dp=2, ep=2, frozen=r"experts\.[01]\.", model=MOE),
    "ep2-pp2-frozen-dense": Layout(pp=2, dp=2, ep=2, frozen=r"^(?!.*experts)|layers\.0\.", model=MOE),
    "pp2-uneven": Layout(pp=2, dp=2, first_stage_layers=1),
    "tp2-padded": Layout(tp=2, model={"padding": 3}),
    "tp2-padded-tied": Layout(tp=2, model={"padding": 3, "tied": True}),
    "dp4-instances": Layout(dp=4, instances=2),
    "tp2-dp2-instances": Layout(tp=2, dp=2, instances=2),
    "ep2-dp2-instances": Layout(dp=4, ep=2, instances=2, model=MOE),
    "tp2-recompute": Layout(tp=2, sequence_parallel=True, recompute=True),
    "ep2-recompute": Layout(dp=2, ep=2, recompute=True, model=MOE),
    # sequence parallelism
    "tp2-sp": Layout(tp=2, sequence_parallel=True),
    "tp2-sp-bias": Layout(tp=2, sequence_parallel=True, model={"linear_bias": True, "qk_norm": True}),
    "tp2-sp-dp2-plain": Layout(tp=2, dp=2, sequence_parallel=True, distributed_optimizer=False),
    # context parallelism
    "cp2": Layout(cp=2),
    "cp2-plain": Layout(cp=2, distributed_optimizer=False),
    "tp2-cp2": Layout(tp=2, cp=2, sequence_parallel=True),
    "pp2-cp2-tied": Layout(pp=2, cp=2, model={"tied": True}),
    "cp2-dp2": Layout(cp=2, dp=2),
    "ep2-cp2-dp2-plain": Layout(cp=2, dp=2, ep=2, distributed_optimizer=False, model=MOE),
}

PRECISIONS: dict[str, Layout] = {
    "dp2-bf16": Layout(dp=2, precision="bf16"),
    "dp2-bf16-grads": Layout(dp=2, precision="bf16-grads"),
    "dp2-bf16-plain": Layout(dp=2, precision="bf16", distributed_optimizer=False),
    "dp2-bf16-grads-plain": Layout(dp=2, precision="bf16-grads", distributed_optimizer=False),
    "tp2-bf16-grads": Layout(tp=2, precision="bf16-grads"),
    "tp2-fp16": Layout(tp=2, precision="fp16"),
    "dp2-fp16-plain": Layout(dp=2, precision="fp16", distributed_optimizer=False),
    "ep2-dp2-bf16-grads": Layout(dp=4, ep=2, precision="bf16-grads", model=MOE),
    "dp2-bf16-offload": Layout(dp=2, precision="bf16", cpu_offload=True),
    "dp2-bf16-aware": Layout(dp=2, precision="bf16", cpu_offload=True, precision_aware=True),
    "ep2-dp2-bf16-aware": Layout(dp=4, ep=2, precision="bf16", cpu_offload=True, precision_aware=True, model=MOE),
    "tp2-bf16-grads-aware": Layout(tp=2, precision="bf16-grads", cpu_offload=True, precision_aware=True),
}

# Random masks differ from layout to layout, and auxiliary losses with the micro-batches: no unsharded model to compare with.
RANDOM: dict[str, Layout] = {
    "tp2-dropout": Layout(tp=2, dropout=0.1),
    "tp2-sp-dropout": Layout(tp=2, sequence_parallel=True, dropout=0.1),
    "dp2-dropout": Layout(dp=2, dropout=0.1),
    "pp2-dropout": Layout(pp=2, dropout=0.1),
    "ep2-dropout": Layout(dp=2, ep=2, dropout=0.1, balancing=True, model=MOE | {"routing_bias": True}),
}

# Of Transformer Engine's layers, in processes that have it (tests/transformer_engine).
TRANSFORMER_ENGINE: dict[str, Layout] = {
    name: replace(layout, transformer_engine=True)
    for name, layout in {
        "te": Layout(),
        "te-tp2": Layout(tp=2),
        "te-pp2": Layout(pp=2),
        "te-dp2": Layout(dp=2),
        "te-dp2-overlap": Layout(dp=2, overlap=True, overlap_param_gather=True),
        "te-tp2-sp": Layout(tp=2, sequence_parallel=True),
        "te-tp2-sp-bias": Layout(
            tp=2, sequence_parallel=True, model={"linear_bias": True, "qkv_bias": True, "qk_norm": True}
        ),
        "te-tp2-plain": Layout(tp=2, distributed_optimizer=False),
        "te-tp2-tied": Layout(tp=2, model={"tied": True}),
        "te-tp2-recompute": Layout(tp=2, sequence_parallel=True, recompute=True),
        "te-ep2": Layout(dp=2, ep=2, model=MOE),
        "te-ep2-plain": Layout(dp=2, ep=2, distributed_optimizer=False, model=MOE),
        "te-ep2-bias": Layout(dp=2, ep=2, model={"experts": 4, "linear_bias": True}),
        "te-tp2-latent": Layout(tp=2, sequence_parallel=True, model=LATENT),
        "te-dp2-latent-fused": Layout(dp=2, fused_down=True, model=LATENT),
        "te-tp2-moe": Layout(tp=2, sequence_parallel=True, model=MOE | {"shared_gate": True}),
    }.items()
}

# Megatron leaves the rotary rows of the keys' projection the gradient of one rank's heads: only planted ones can be compared.
FUSED_DOWN: dict[str, Layout] = {
    "te-tp2-latent-fused": Layout(tp=2, sequence_parallel=True, transformer_engine=True, fused_down=True, model=LATENT),
}

# The same in FP8, in sizes that its products take, with the layers' weights held in FP8.
FP8: dict[str, Layout] = {
    name: replace(layout, transformer_engine=True, precision="bf16", fp8_params=True, model=layout.model | {"ffn": 64})
    for name, layout in {
        "te-dp2-fp8-tensorwise": Layout(dp=2, overlap=True, overlap_param_gather=True, fp8="tensorwise"),
        "te-tp2-fp8-delayed": Layout(tp=2, sequence_parallel=True, fp8="delayed"),
        "te-dp2-fp8-delayed": Layout(dp=2, overlap=True, fp8="delayed"),
        "te-dp2-fp8-blockwise": Layout(dp=2, fp8="blockwise"),
        "te-ep2-fp8-tensorwise": Layout(
            dp=2, ep=2, fp8="tensorwise", model={"experts": 4, "expert_ffn": 32, "shared_ffn": 32}
        ),
    }.items()
}

# With weights in bf16, of which FP8 copies are kept from one micro-batch to the next.
CACHED_FP8: dict[str, Layout] = {
    "te-dp2-fp8-cached": replace(FP8["te-dp2-fp8-tensorwise"], fp8_params=False),
    "te-dp2-fp8-cached-e4m3": replace(FP8["te-dp2-fp8-delayed"], fp8_params=False, fp8_format="e4m3"),
}

# Its fused attention, which takes 16 bits only, and which context parallelism needs.
FUSED_ATTENTION: dict[str, Layout] = {
    name: replace(layout, transformer_engine=True, precision="bf16")
    for name, layout in {
        "te-bf16": Layout(),
        "te-cp2-bf16": Layout(cp=2),
        "te-cp2-bf16-mqa": Layout(cp=2, distributed_optimizer=False, model={"query_groups": 1}),
        "te-tp2-cp2-bf16": Layout(tp=2, cp=2, sequence_parallel=True),
    }.items()
}

ALL_LAYOUTS = LAYOUTS | PRECISIONS | TRANSFORMER_ENGINE | FUSED_DOWN | FP8 | CACHED_FP8 | FUSED_ATTENTION
