"""Mistakes in what enters a sum, and how often."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import GRAM, PARITY

COUNTING = (
    Mutation(
        "replicated-weight-counted-twice",
        "megatron_ogpsa/sharding/ownership.py",
        "    counted = is_own and param_is_not_shared(param)\n",
        "    counted = param_is_not_shared(param)\n",
        (f"{GRAM}[tp2]",),
        "norm weights, which every tensor-parallel rank holds in full, enter sums once for each rank",
    ),
    Mutation(
        "tied-embedding-counted-twice",
        "megatron_ogpsa/sharding/ownership.py",
        "    counted = is_own and param_is_not_shared(param)\n",
        "    counted = is_own\n",
        (f"{GRAM}[pp2-tied]",),
        "both copies of a tied embedding, on the first and the last stage, enter sums",
    ),
    Mutation(
        "sinks-of-the-first-rank-alone",
        "megatron_ogpsa/sharding/ownership.py",
        '    return parameter.name.endswith(".softmax_offset")\n',
        "    return False\n",
        (f"{GRAM}[tp2-sinks]",),
        "attention sinks, which Megatron does not mark as split, are taken for copies of the first rank's",
    ),
    Mutation(
        "tied-embedding-is-two-blocks",
        "megatron_ogpsa/sharding/names.py",
        "return _EMBEDDING_WEIGHT",
        "return name",
        (f"{PARITY}[pp2-tied]",),
        "the last stage's copy of a tied embedding is taken for a tensor of its own",
    ),
    Mutation(
        "data-parallel-copies-counted-twice",
        "megatron_ogpsa/sharding/ownership.py",
        "return counted and (not reduction.holds_copies or _copies_group(parameter, optimizer).rank() == 0)",
        "return counted and parameter.param.requires_grad",
        (f"{GRAM}[ep2-plain]",),
        "without the distributed optimizer, and with experts, every data-parallel copy enters sums",
    ),
    Mutation(
        "experts-counted-by-dense-rank",
        "megatron_ogpsa/sharding/ownership.py",
        "chunk.intra_expt_dp_group if _is_expert(parameter.param) else chunk.intra_dp_cp_group",
        "chunk.intra_dp_cp_group",
        (f"{GRAM}[ep2-plain]",),
        "experts of all but the first rank enter no sum: their copies are sought among dense parameters' ranks",
    ),
    Mutation(
        "summed-over-all-ranks",
        "megatron_ogpsa/sharding/ownership.py",
        "    return Reduction(group, holds_copies=True)",
        "    return Reduction(group, holds_copies=False)",
        (f"{GRAM}[dp2-plain]",),
        "sums go over all ranks, and what data-parallel ranks hold copies of enters them once for each",
    ),
)
