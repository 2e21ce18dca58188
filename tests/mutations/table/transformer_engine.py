"""Mistakes that only models of Transformer Engine's layers show, in FP8 and without."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

TE = "tests/transformer_engine"
STATE = "megatron_ogpsa/precision/fp8_state.py"
WITHOUT = "megatron_ogpsa/precision/passes_without_fp8.py"
IN_BF16 = "test_reference_gradients_without_fp8_are_those_of_a_model_in_bf16"
FIRST = "test_the_first_reference_gradients_are_taken_with_scales_that_fit"

TRANSFORMER_ENGINE = (
    Mutation(
        "grouped-experts-numbered-on-each-rank",
        "megatron_ogpsa/sharding/names.py",
        "_SEQUENTIAL_EXPERT.search(name) or _GROUPED_EXPERT.search(name)",
        "_SEQUENTIAL_EXPERT.search(name)",
        (f"{TE}/test_layers.py::test_gram_matrices_are_bitwise_those_of_the_unsharded_model[te-ep2]",),
        "weight0 of each expert-parallel rank's grouped experts is taken for the same expert",
    ),
    Mutation(
        "cached-fp8-weights-kept",
        STATE,
        "        self.module._fp8_workspaces.clear()\n",
        "        self.module._fp8_workspaces.copy()\n",
        (f"{TE}/test_fp8_state.py::test_refreshes_leave_no_trace[te-dp2-fp8-cached-False]",),
        "FP8 copies of weights that a reference pass made stay for whoever comes next",
    ),
    Mutation(
        "scales-found-in-one-pass",
        "megatron_ogpsa/precision/first_scales.py",
        "MAX_PASSES = 64\n",
        "MAX_PASSES = 1\n",
        (f"{TE}/test_fp8_state.py::{FIRST}[te-dp2-fp8-cached-e4m3-True]",),
        "gradients that vanish in one layer leave the layers before it without scales",
    ),
    Mutation(
        "scales-not-put-back",
        STATE,
        "            self.module.reset_fp8_meta_tensors(self._of_the_length_in_use())\n",
        "            pass\n",
        (f"{TE}/test_fp8_state.py::test_refreshes_leave_no_trace[te-tp2-fp8-delayed-False]",),
        "training goes on with scales that reference passes have moved",
    ),
    Mutation(
        "references-asked-for-in-bf16-are-in-fp8",
        "megatron_ogpsa/references/gradients.py",
        "without_fp8(self.chunks) if self.in_bf16 else nullcontext()",
        "nullcontext()",
        (f"{TE}/test_fp8_state.py::{IN_BF16}[te-dp2-fp8-cached]",),
        "the flag is read, and passes go on in FP8",
    ),
    Mutation(
        "modules-forget-that-they-are-in-fp8",
        WITHOUT,
        'module.fp8_meta["fp8_checkpoint"] = value',
        'module.fp8_meta["fp8_checkpoint"] = False',
        (f"{TE}/test_fp8_state.py::{IN_BF16}[te-tp2-fp8-delayed]",),
        "a checkpoint right after a refresh without FP8 would lack the scales",
    ),
    Mutation(
        "scales-of-a-checkpoint-sought-in-histories",
        STATE,
        "bool(state.scale[0] != 1)",
        "bool(state.amax_history.any())",
        (f"{TE}/test_training.py::test_checkpoints_are_scored",),
        "at Megatron's history length of 1 a history is empty after each pass, so that no checkpoint has scales",
    ),
    Mutation(
        "packed-rows-attend-to-each-other-in-transformer-engine",
        "megatron_ogpsa/integration/inputs/batch.py",
        "    is_start[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]\n",
        "    is_start[:, 1:] = False\n",
        (f"{TE}/test_training.py::test_losses_are_those_of_megatrons_layers[sft-tp2]",),
        "documents of a packed row see those before them",
    ),
)
