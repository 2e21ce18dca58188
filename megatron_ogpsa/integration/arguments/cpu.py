"""Megatron's flags on a machine without a GPU: other defaults, and refusals of what cannot run there."""

from __future__ import annotations

import argparse

from megatron_ogpsa.refusal import Refusal, refuse


def set_cpu_defaults(parser: argparse.ArgumentParser) -> None:
    """Change the defaults of Megatron's parser to what runs on the CPU; flags that the user gives still win.

    Thus one configuration serves both: what it leaves open is chosen by the machine.
    """
    from megatron.core.transformer.enums import AttnBackend

    parser.set_defaults(
        distributed_backend="gloo",
        use_cpu_initialization=True,
        transformer_impl="local",
        attention_backend=AttnBackend.unfused,
        # Fusions are CUDA kernels, or are compiled with a compiler that a plain machine does not have.
        gradient_accumulation_fusion=False,
        bias_gelu_fusion=False,
        bias_swiglu_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        no_persist_layer_norm=True,
        create_attention_mask_in_dataloader=False,
        # Two worker processes for each rank would outnumber the cores that do the arithmetic.
        num_workers=0,
    )


WITHOUT_GPU = (
    Refusal(
        "--transformer-impl {0.transformer_impl}",
        "",
        "leave it out or say --transformer-impl local",
        lambda args: args.transformer_impl != "local",
    ),
    Refusal("--fp8-format", "", "use --bf16 or full precision", lambda args: args.fp8),
    Refusal("--fp4-format", "", "use --bf16 or full precision", lambda args: args.fp4),
    Refusal(
        "--context-parallel-size",
        "its attention is Transformer Engine's",
        "use --context-parallel-size 1",
        lambda args: args.context_parallel_size > 1,
    ),
    Refusal(
        "--multi-latent-attention",
        "Megatron's own attention does not take the sizes of its heads",
        "train another model",
    ),
    Refusal(
        "--moe-token-dispatcher-type",
        "gloo has no uneven all-to-all",
        "use --moe-token-dispatcher-type allgather",
        lambda args: args.num_experts is not None and args.moe_token_dispatcher_type != "allgather",
    ),
    Refusal("--moe-grouped-gemm", "the grouped product is a CUDA kernel"),
    Refusal("--cuda-graph-impl", "", applies=lambda args: args.cuda_graph_impl != "none"),
    Refusal(
        "--distributed-backend {0.distributed_backend}",
        "",
        "leave it out or say --distributed-backend gloo",
        lambda args: args.distributed_backend != "gloo",
    ),
)


TRAINING_WITHOUT_GPU = (Refusal("--sequence-parallel", "Megatron's torch norm does not support it"),)
"""Scoring does without it by itself."""


def check_supported_on_cpu(args: argparse.Namespace, *, for_training: bool = True) -> None:
    """Refuse, by the name of the flag, what cannot run without a GPU.

    Raises:
        UnsupportedError: naming the first such flag and the remedy.
    """
    refuse((*WITHOUT_GPU, *(TRAINING_WITHOUT_GPU if for_training else ())), args, " needs a GPU, and none was found")
