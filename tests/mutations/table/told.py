"""Mistakes in what a run tells of itself."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import INTERVAL, PASSES

TOLD = (
    Mutation(
        "change-told-of-one-shard",
        "megatron_ogpsa/plugin/ogpsa.py",
        "                tables.append(along_BK - self._along_BK)",
        "                tables.append((along_BK - self._along_BK) / self._shard.reduction.group.size())",
        (f"{INTERVAL}[tp2-pp2-tensor]",),
        "the movement along the basis is averaged over ranks where it is a sum",
    ),
    Mutation(
        "change-told-with-the-new-basis",
        "megatron_ogpsa/plugin/ogpsa.py",
        "            if along_BK is not None and self._along_BK is not None:",
        "            self._along_BK = None if self._along_BK is None else torch.zeros_like(self._along_BK)\n"
        "            if along_BK is not None and self._along_BK is not None:",
        (f"{INTERVAL}[dp2-plain-tensor]",),
        "the weights are taken for what the steps have changed of them",
    ),
    Mutation(
        "staleness-of-lengths",
        "megatron_ogpsa/plugin/interval.py",
        "        captured_K = with_old_BKJ.square().sum(dim=(0, 2)) / energy_K",
        "        captured_K = (with_old_BKJ.square().sum(dim=(0, 2)) / energy_K).sqrt()",
        (f"{INTERVAL}[dp2-plain-tensor]",),
        "a share of lengths is told for a share of energy",
    ),
    Mutation(
        "reference-losses-of-one-rank",
        "megatron_ogpsa/references/gradients.py",
        "    dist.all_reduce(table_K2, group=parallel_state.get_data_parallel_group(with_context_parallel=True))\n",
        "",
        (f"{PASSES}[dp2-overlap]",),
        "a reference's loss is that of one data-parallel rank's share of its samples",
    ),
    Mutation(
        "references-undone-together",
        "megatron_ogpsa/references/gradients.py",
        "with reference_pass(self.chunks), without_fp8(self.chunks) if self.in_bf16 else nullcontext():\n",
        "with reference_pass(self.chunks) if reference is references[-1] else nullcontext():\n",
        ("tests/core/test_references.py::test_a_reference_does_not_depend_on_those_before_it",),
        "what a reference's pass does to the experts' bias is undone after the last one only",
    ),
    Mutation(
        "parts-of-a-reference-overlap",
        "megatron_ogpsa/references/gradients.py",
        "self.micro_batches[part * length : (part + 1) * length]",
        "self.micro_batches[: (part + 1) * length]",
        ("tests/core/test_references.py::test_parts_of_a_reference_are_gradients_of_disjoint_samples[dp2]",),
        "each part of a reference has the samples of those before it",
    ),
    Mutation(
        "sequences-cut-in-halves",
        "megatron_ogpsa/integration/inputs/context_parallel.py",
        "    own: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(fields, is_hybrid_cp=False, cp_group=group)",
        "    own = {name: value.chunk(group.size(), dim=1)[group.rank()] for name, value in fields.items()}",
        ("tests/integration/test_context_parallel.py",),
        "context-parallel ranks get halves of a sequence, while attention takes them for its first and last quarter",
    ),
)
