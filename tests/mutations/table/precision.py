"""Mistakes in dtypes."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import GRAM, MATHEMATICS, SIXTEEN_BIT

PRECISION = (
    Mutation(
        "gram-in-fp32",
        "megatron_ogpsa/projection/segments.py",
        "weight * (rows_KT @ rows_KT.mT)",
        "weight * (rows_KT.float() @ rows_KT.float().mT)",
        (f"{MATHEMATICS}::test_nearly_parallel_references_are_told_apart",),
        "Gram matrices are summed in fp32: references that are nearly parallel become one",
    ),
    Mutation(
        "dots-in-fp32",
        "megatron_ogpsa/projection/segments.py",
        "weight * (rows_KT @ vector_T)",
        "weight * (rows_KT.float() @ vector_T.float())",
        (f"{MATHEMATICS}::test_a_long_block_is_summed_in_fp64",),
        "the coefficients of a step are summed in fp32",
    ),
    Mutation(
        "copies-rounded-by-a-matrix-product",
        "megatron_ogpsa/projection/segments.py",
        "    total_T = rows_KT[0] * _per_element(tile, weights_BK[:, 0])\n",
        "    if tile.lengths_S is None:\n        return rows_KT.mT.contiguous() @ weights_BK[tile.block]\n"
        "    total_T = rows_KT[0] * _per_element(tile, weights_BK[:, 0])\n",
        (f"{MATHEMATICS}::test_copies_stay_bitwise_the_same_however_their_tiles_are_cut",),
        "a matrix product is faster, and rounds copies of a weight differently on each rank",
    ),
    Mutation(
        "rank-depends-on-magnitude",
        "megatron_ogpsa/projection/basis.py",
        "scale_BK = torch.where(diagonal_BK > 0, diagonal_BK, 1.0).rsqrt() * (diagonal_BK > 0)",
        "scale_BK = (diagonal_BK > 0).double()",
        (f"{MATHEMATICS}::test_only_the_span_of_the_references_matters",),
        "references are not scaled to length one, so that small ones fall under the tolerance",
    ),
    Mutation(
        "loss-scale-left-in",
        "megatron_ogpsa/plugin/ogpsa.py",
        "            row_N.div_(scale)\n",
        "            row_N.mul_(1.0)\n",
        (f"{GRAM}[tp2-fp16]",),
        "the loss scale of fp16 training is not divided out of references",
    ),
    Mutation(
        "packed-gradient-not-written-back",
        "megatron_ogpsa/plugin/gradient_space.py",
        "        self._shard.store()\n",
        "",
        (f"{SIXTEEN_BIT}[dp2-bf16-grads-tensor]",),
        "with bf16 gradients the packed copy is projected, and not what the optimizer reads",
    ),
)
