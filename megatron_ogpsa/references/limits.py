"""What reference passes through Megatron's schedules would disturb, by the fields of a model's configuration.

For the loops that make them, Megatron's and Bridge's: who attaches the plugin to a loop of his own makes his own passes.
"""

from __future__ import annotations

from megatron_ogpsa.refusal import Refusal

PASSES = (
    Refusal(
        "--fp4-format",
        "reference passes would leave their mark on its scaling factors",
        "train in --bf16 or with --fp8-format",
        lambda model: model.fp4,
    ),
    Refusal(
        "--cuda-graph-impl",
        "graphs replay training passes only",
        applies=lambda model: model.cuda_graph_impl not in (None, "none"),
    ),
    Refusal("--moe-paged-stash", "its buffers would be sized for reference passes"),
    Refusal("--hybrid-context-parallel", "its schedule reads Megatron's own packed data"),
    Refusal(
        "--fine-grained-activation-offloading",
        "it is set up for the micro-batches of the first pass, which would be a reference's",
    ),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "it schedules micro-batches layer by layer, which reference passes are not",
    ),
)
