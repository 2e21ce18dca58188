"""Mistakes between Hugging Face and Megatron."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

LOGITS = "tests/conversion/test_families.py::test_logits_are_those_of_transformers[tp1]"

CONVERSION = (
    Mutation(
        "gate-and-up-swapped",
        "megatron_ogpsa/conversion/families.py",
        '    "linear_fc1.weight[gate]": "gate_proj.weight",\n    "linear_fc1.weight[up]": "up_proj.weight",\n',
        '    "linear_fc1.weight[gate]": "up_proj.weight",\n    "linear_fc1.weight[up]": "gate_proj.weight",\n',
        (LOGITS,),
        "the halves of the gated first layer change places",
    ),
    Mutation(
        "window-off-by-one",
        "megatron_ogpsa/conversion/families.py",
        'f"({window - 1},0)"',
        'f"({window},0)"',
        (LOGITS,),
        "Megatron's window does not count the token itself, Hugging Face's does",
    ),
    Mutation(
        "rope-factor-dropped",
        "megatron_ogpsa/conversion/families.py",
        '"rope-scaling-factor": float(rope["factor"])',
        '"rope-scaling-factor": 8.0',
        (LOGITS,),
        "every Llama 3 is scaled by the first one's factor",
    ),
    Mutation(
        "experts-chosen-after-softmax",
        "megatron_ogpsa/conversion/families.py",
        "{} if config.norm_topk_prob else",
        "{} if not config.norm_topk_prob else",
        (LOGITS,),
        "weights of the chosen experts are normalised where they are not to be",
    ),
    Mutation(
        "query-and-key-norms-swapped",
        "megatron_ogpsa/conversion/families.py",
        '    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",\n'
        '    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",\n',
        '    "self_attention.q_layernorm.weight": "self_attn.k_norm.weight",\n'
        '    "self_attention.k_layernorm.weight": "self_attn.q_norm.weight",\n',
        (LOGITS,),
        "queries are normed with the keys' weights",
    ),
    Mutation(
        "answers-that-do-not-end",
        "megatron_ogpsa/integration/inputs/datasets.py",
        "        args.chat_end_id = tokenizer.turn_end_id\n",
        "        pass\n",
        ("tests/conversion/test_training.py::test_an_exported_model_stops_where_it_has_learnt_to",),
        "checkpoints do not say in which token answers end, so that whoever serves an exported model waits for another",
    ),
    Mutation(
        "base-model-without-template",
        "megatron_ogpsa/conversion/chat.py",
        "    if own is None or",
        "    if own is not None and",
        ("tests/conversion/test_chat.py::test_a_base_model_gains_what_it_was_trained_with",),
        "a model made of a base model is exported without the chat template that it was trained with",
    ),
    Mutation(
        "norm-before-experts-under-one-key",
        "megatron_ogpsa/conversion/model.py",
        "    if family.experts is None or _NORM_OF_LINEAR not in key:\n",
        "    if True:\n",
        ("tests/conversion/test_keys.py",),
        "converted mixtures of experts do not load into Transformer Engine's layers",
    ),
)
