"""Clusters as data: a new one is one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.core.oracle import ModelShape


@dataclass(frozen=True, kw_only=True)
class World:
    """A model on a cluster.

    Attributes:
        flags: Megatron's, beside the model's own.
        model: what differs from the default ``ModelShape``.
    """

    size: int
    flags: str
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> ModelShape:
        return ModelShape(**self.model)

    def as_flags(self) -> list[str]:
        """The command line of a run, with two references; data and tokenizer are named and never read."""
        return [*_model_flags(self.shape), *RUN.split(), *self.flags.split()]


RUN = (
    "--micro-batch-size 1 --train-iters 10 --lr 1e-6 --seq-length 64 --max-position-embeddings 64 "
    "--ogpsa-train-data train.jsonl --ogpsa-reference math=math.jsonl --ogpsa-reference chat=chat.jsonl "
    "--tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer"
)

LARGE: dict[str, Any] = {"num_layers": 16, "hidden": 128, "heads": 16, "query_groups": 8, "ffn": 256, "vocabulary": 256}
EXPERTS: dict[str, Any] = {"experts": 16, "expert_ffn": 32, "shared_ffn": 64}
DISTRIBUTED = "--bf16 --use-distributed-optimizer"

WORLDS: dict[str, World] = {
    "tp4-pp2-dp4": World(
        size=32,
        flags=f"{DISTRIBUTED} --tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--global-batch-size 8",
        model=LARGE | {"num_layers": 4},
    ),
    "tp4-pp4-vpp2-tied-plain": World(
        size=32,
        flags="--bf16 --tensor-model-parallel-size 4 --pipeline-model-parallel-size 4 --global-batch-size 8 "
        "--num-layers-per-virtual-pipeline-stage 1",
        model=LARGE
        | {"num_layers": 8, "tied": True, "query_groups": 2, "qkv_bias": True, "qk_norm": True, "sinks": True},
    ),
    "ep4-etp1-tp2-pp2-instances": World(
        size=32,
        flags=f"{DISTRIBUTED} --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel "
        "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --global-batch-size 8 "
        "--num-distributed-optimizer-instances 2",
        model=LARGE | EXPERTS | {"num_layers": 4, "dense_layers": 1},
    ),
    "ep2-tp2-plain-fp32": World(
        size=16,
        flags="--tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 2 "
        "--sequence-parallel --global-batch-size 8",
        model=LARGE | EXPERTS | {"num_layers": 2},
    ),
    "ep8-etp1-tp2-latent": World(
        size=16,
        flags=f"{DISTRIBUTED} --tensor-model-parallel-size 2 --expert-model-parallel-size 8 --expert-tensor-parallel-size 1 "
        "--sequence-parallel --global-batch-size 8 --transformer-impl transformer_engine",
        model=LARGE | EXPERTS | {"num_layers": 2, "dense_layers": 1, "latent": True, "q_rank": 48, "kv_rank": 32},
    ),
}

THOUSAND: dict[str, World] = {
    "tp8-pp8-dp16": World(
        size=1024,
        flags=f"{DISTRIBUTED} --tensor-model-parallel-size 8 --pipeline-model-parallel-size 8 --sequence-parallel "
        "--global-batch-size 128",
        model=LARGE,
    ),
    "ep16-etp1-tp4-pp8": World(
        size=1024,
        flags=f"{DISTRIBUTED} --tensor-model-parallel-size 4 --pipeline-model-parallel-size 8 --sequence-parallel "
        "--expert-model-parallel-size 16 --expert-tensor-parallel-size 1 --global-batch-size 128",
        model=LARGE | EXPERTS,
    ),
}
"""Minutes, not seconds: for ``python -m tests.planning.every_rank``."""


def _model_flags(shape: ModelShape) -> list[str]:
    flags: dict[str, Any] = {
        "num-layers": shape.num_layers,
        "hidden-size": shape.hidden,
        "ffn-hidden-size": shape.ffn,
        "num-attention-heads": shape.heads,
        "vocab-size": shape.vocabulary,
        "make-vocab-size-divisible-by": 1,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
    }
    switches = ["swiglu", "disable-bias-linear"]
    if shape.latent:
        sizes = {
            "qk-head-dim": shape.head_size,
            "qk-pos-emb-head-dim": shape.rotary_size,
            "v-head-dim": shape.head_size,
        }
        flags |= sizes | {"q-lora-rank": shape.q_rank, "kv-lora-rank": shape.kv_rank, "rope-type": "rope"}
        switches += ["multi-latent-attention", "qk-layernorm"]
    else:
        flags["num-query-groups"] = shape.query_groups
        switches.append("group-query-attention")
    switches += [] if shape.tied else ["untie-embeddings-and-output-weights"]
    if shape.sinks:
        flags["softmax-type"] = "learnable"
    switches += ["add-qkv-bias"] * shape.qkv_bias + ["qk-layernorm"] * shape.qk_norm
    if shape.experts:
        flags |= {
            "num-experts": shape.experts,
            "moe-ffn-hidden-size": shape.expert_ffn,
            "moe-shared-expert-intermediate-size": shape.shared_ffn,
            "moe-router-topk": shape.top_k,
            "moe-layer-freq": f"[0]*{shape.dense_layers}+[1]*{shape.num_layers - shape.dense_layers}",
            "moe-token-dispatcher-type": "allgather",
        }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))] + [f"--{s}" for s in switches]
