"""Mistakes in sums over ranks."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import COLLECTIVES, CONFLICT, GRAM, NOT_FINITE, PARITY

REDUCTIONS = (
    Mutation(
        "shard-local-dots",
        "megatron_ogpsa/collectives.py",
        "    dist.all_reduce(table, op=dist.ReduceOp.SUM, group=group)\n    return table",
        "    return table",
        (f"{PARITY}[tp2]",),
        "each rank projects with the dot products of its own shard",
    ),
    Mutation(
        "tp-reduction-dropped",
        "megatron_ogpsa/plugin/gradient_space.py",
        """        sums = sum_over_ranks(dots(layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group)
        coefficients_BK""",
        """        from megatron.core import parallel_state

        group = parallel_state.get_pipeline_model_parallel_group()
        sums = sum_over_ranks(dots(layout, basis.rows_KN, self._shard.spans), group)
        coefficients_BK""",
        (f"{PARITY}[tp2]",),
        "coefficients of a step are not summed over tensor-parallel ranks",
    ),
    Mutation(
        "pp-reduction-dropped",
        "megatron_ogpsa/plugin/ogpsa.py",
        "        summed = sum_over_ranks(joined, self._shard.reduction.group).cpu()",
        """        from megatron.core import parallel_state

        group = parallel_state.get_tensor_model_parallel_group()
        summed = sum_over_ranks(joined, group).cpu()""",
        (f"{PARITY}[pp2]",),
        "Gram matrices are not summed over pipeline stages",
    ),
    Mutation(
        "dp-reduction-dropped",
        "megatron_ogpsa/sharding/ownership.py",
        "        return Reduction(groups[0], holds_copies=False)",
        """        return Reduction(
            parallel_state.get_model_parallel_group() if chunks else groups[0], holds_copies=False
        )""",
        (f"{GRAM}[dp2-overlap]",),
        "the distributed optimizer's shards are not summed over data-parallel ranks",
    ),
    Mutation(
        "conflict-decided-per-rank",
        "megatron_ogpsa/plugin/gradient_space.py",
        """        sums = sum_over_ranks(dots(layout, basis.rows_KN, self._shard.spans), self._shard.reduction.group)
        coefficients_BK, squared_norm_B = sums[:, :-1], sums[:, -1]
        removed_BK = basis.removed(coefficients_BK)
""",
        """        sums = dots(layout, basis.rows_KN, self._shard.spans).contiguous()
        local_BK = basis.removed(sums[:, :-1])
        sum_over_ranks(sums, self._shard.reduction.group)
        removed_BK = sum_over_ranks(local_BK.contiguous(), self._shard.reduction.group)
        coefficients_BK, squared_norm_B = sums[:, :-1], sums[:, -1]
""",
        (f"{CONFLICT}[dp2]",),
        "which references are hurt is decided on each rank's share of the gradient, then summed, as the authors do",
    ),
    Mutation(
        "nan-decided-on-each-rank",
        "megatron_ogpsa/plugin/gradient_space.py",
        "        if not self._all_finite_or_told(squared_norm_B, before, trace):\n",
        "        if not all(bool(span.isfinite().all()) for span in self._shard.spans):\n",
        (f"{NOT_FINITE}[tp2-1]",),
        "a rank looks at its own gradient to see whether the step must be skipped",
    ),
    Mutation(
        "one-collective-more",
        "megatron_ogpsa/plugin/space.py",
        '        if self._norm is None:\n            return self._megatrons["get_grad_norm"]()\n        if clip_grads',
        "        if self._norm is not None or self.basis is None:\n"
        '            return self._megatrons["get_grad_norm"]()\n        if clip_grads',
        (f"{COLLECTIVES}[tp2-tensor]",),
        "the norm is asked of Megatron again, although the projection knows it: right, and an all-reduce more",
    ),
)
