"""Mistakes in how parameters are cut into blocks."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import GRAM, MATHEMATICS, PARITY

BLOCKS = (
    Mutation(
        "qkv-is-one-tensor",
        "megatron_ogpsa/sharding/logical.py",
        "    if _QKV.search(parameter.name):",
        "    if _QKV.search(parameter.name) and not config.num_attention_heads:",
        (f"{PARITY}[dp2]",),
        "Megatron's fused QKV is projected as one tensor",
    ),
    Mutation(
        "qkv-without-query-groups",
        "megatron_ogpsa/sharding/logical.py",
        """    query_rows = config.num_attention_heads // config.num_query_groups * config.kv_channels
    if getattr(config, "attention_output_gate", False):
        query_rows *= 2  # Hugging Face's q_proj has the gate's rows too
    parts = (("q", query_rows), ("k", config.kv_channels), ("v", config.kv_channels))
""",
        """    kv_rows = config.num_query_groups * config.kv_channels
    parts = (("q", config.num_attention_heads * config.kv_channels), ("k", kv_rows), ("v", kv_rows))
""",
        (f"{PARITY}[dp2]",),
        "fused rows are read as all of q, then all of k, then all of v; Megatron has them by query group",
    ),
    Mutation(
        "cut-query-group-ignored",
        "megatron_ogpsa/sharding/logical.py",
        "return RowPattern(parts, first_row % sum(rows for _, rows in parts))",
        "return RowPattern(parts, first_row - first_row)",
        (f"{GRAM}[tp2-mqa]",),
        "a tensor-parallel rank whose rows begin within a query group reads them from the group's start",
    ),
    Mutation(
        "gate-and-up-are-one-tensor",
        "megatron_ogpsa/sharding/logical.py",
        'return RowPattern(parts=(("gate", rows), ("up", rows)))',
        'return RowPattern(parts=(("gate_up", 2 * rows),))',
        (f"{PARITY}[dp2]",),
        "the fused first layer of a gated MLP is projected as one tensor",
    ),
    Mutation(
        "gate-and-up-interleaved",
        "megatron_ogpsa/sharding/logical.py",
        "rows = _interleave_size(config, parameter.name) or parameter.param.shape[0] // 2",
        "rows = _interleave_size(config, parameter.name) or 1",
        (f"{PARITY}[dp2]",),
        "gate and up are taken for alternating rows; they follow each other",
    ),
    Mutation(
        "experts-numbered-on-each-rank",
        "megatron_ogpsa/sharding/names.py",
        "expert = int(match.group(2)) + chunk.ep_group.rank() * num_local_experts",
        "expert = int(match.group(2)) % num_local_experts",
        (f"{PARITY}[ep2]",),
        "expert 0 of each expert-parallel rank is taken for the same expert",
    ),
    Mutation(
        "layers-numbered-on-each-stage",
        "megatron_ogpsa/sharding/names.py",
        'prefixes[prefix] = f"{prefix[: match.start(1)]}{submodule.layer_number - 1}"',
        'prefixes[prefix] = f"{prefix[: match.start(1)]}{int(match.group(1))}"',
        (f"{PARITY}[pp2]",),
        "layer 0 of each pipeline stage is taken for the same layer",
    ),
    Mutation(
        "padding-moved",
        "megatron_ogpsa/sharding/gradients.py",
        "(padding if index == len(runs) - 1 else 0)",
        "(padding if index == 0 else 0)",
        (f"{GRAM}[tp2-qkv-bias]",),
        "padding behind a fused parameter is put behind its first part, and shifts the others",
    ),
    Mutation(
        "copies-not-projected",
        "megatron_ogpsa/projection/segments.py",
        "    coefficients_BK = coefficients_BK.float()\n    for tile, rows_KT in tiles_of(layout, rows_KN):\n",
        "    coefficients_BK = coefficients_BK.float()\n    for tile, rows_KT in tiles_of(layout, rows_KN):\n"
        "        if tile.lengths_S is None and not tile.counted:\n            continue\n",
        (f"{MATHEMATICS}::test_copies_stay_bitwise_the_same_however_their_tiles_are_cut",),
        "copies that do not enter sums are not projected either, and drift away from the one that does",
    ),
    Mutation(
        "query-groups-of-the-whole-model",
        "megatron_ogpsa/sharding/names.py",
        '        config = getattr(module, "config", config)\n',
        "",
        ("tests/core/test_logical.py::test_layers_of_a_heterogeneous_model_have_query_groups_of_their_own",),
        "query, key and value of a layer with query groups of its own are cut where another layer's end",
    ),
    Mutation(
        "latent-projections-are-one-tensor",
        "megatron_ogpsa/sharding/logical.py",
        '        return RowPattern(parts=(("q_down", query_rows), ("kv_down", rows - query_rows)))\n',
        "        return WHOLE\n",
        (
            "tests/transformer_engine/test_layers.py::test_gram_matrices_are_bitwise_those_of_the_unsharded_model"
            "[te-tp2-latent-fused]",
        ),
        "latent attention's projections down are one block where they are one parameter, and two elsewhere",
    ),
    Mutation(
        "copies-left-to-drift-apart",
        "megatron_ogpsa/plugin/limits.py",
        "model.tensor_model_parallel_size > 1 and not model.sequence_parallel",
        "model.tensor_model_parallel_size > 1 and model.sequence_parallel is None",
        ("tests/core/test_models.py::test_copies_that_megatron_lets_drift_apart_are_refused",),
        "latent attention is projected where Megatron gives copies of a weight different gradients",
    ),
)
