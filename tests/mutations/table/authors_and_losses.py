"""Mistakes in the authors' rules and in the losses."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import AUTHORS_LEAK, PREFERENCE, REFUSED_WITH_AUTHORS, SHARDED_PREFERENCE

AUTHORS_AND_LOSSES = (
    Mutation(
        "leak-at-the-first-refresh",
        "megatron_ogpsa/integration/projection/authors.py",
        "is_leaking = args.ogpsa_authors_leak and step > 0 and step % interval == 0",
        "is_leaking = args.ogpsa_authors_leak and step % interval == 0",
        (AUTHORS_LEAK,),
        "the authors' leak begins one refresh too early",
    ),
    Mutation(
        "authors-rule-with-three-references",
        "megatron_ogpsa/integration/projection/authors.py",
        "MAX_REFERENCES = 2\n",
        "MAX_REFERENCES = 3\n",
        (REFUSED_WITH_AUTHORS,),
        "the authors' rule is given more references than their code takes",
    ),
    Mutation(
        "log-probs-of-copies-added-up",
        "megatron_ogpsa/reference_policy/passes.py",
        "    if outputs and parallel_state.get_tensor_model_parallel_rank() == 0:\n",
        "    if outputs and parallel_state.get_tensor_model_parallel_rank() >= 0:\n",
        (f"{SHARDED_PREFERENCE}::test_reference_log_probabilities_are_those_of_each_answer_alone[tp2]",),
        "every tensor-parallel rank adds its copy of a reference log-probability",
    ),
    Mutation(
        "rows-without-pairs-counted",
        "megatron_ogpsa/losses/preference.py",
        "loss = torch.where(exists_BP, loss_BP, 0.0).sum().float()",
        "loss = loss_BP.sum().float()",
        (f"{PREFERENCE}::test_rows_without_pairs_add_nothing",),
        "room for pairs that a row does not have adds log 2 to the loss",
    ),
    Mutation(
        "rejected-answers-in-the-reference",
        "megatron_ogpsa/losses/preference.py",
        "return loss_mask * (document_ids % 2 == 0)",
        "return loss_mask * (document_ids >= 0)",
        (f"{SHARDED_PREFERENCE}::test_the_projected_gradient_of_dpo_is_the_unsharded_one[dp2]",),
        "the likelihood of rejected answers is protected as well",
    ),
    Mutation(
        "filler-rows-have-tokens",
        "megatron_ogpsa/data/micro_batches.py",
        '    filler["loss_mask"].zero_()\n',
        '    filler["loss_mask"].clamp_(0, 1)\n',
        (f"{SHARDED_PREFERENCE}::test_the_projected_gradient_of_dpo_is_the_unsharded_one[dp2]",),
        "rows that only make ranks come out even are trained on",
    ),
    Mutation(
        "reference-policy-of-the-round-before",
        "megatron_ogpsa/integration/reference_policy.py",
        "None if self._args.finetune else self._args.load]",
        "self._args.load]",
        ("tests/integration/test_dpo.py::test_each_round_of_dpo_has_a_reference_policy_of_its_own",),
        "a second round of DPO trains against the reference policy of the first",
    ),
    Mutation(
        "log-probabilities-left-in-the-other-folder",
        "megatron_ogpsa/integration/reference_policy.py",
        "        self._keep(found)\n        return found\n",
        "        return found\n",
        ("tests/integration/test_dpo.py::test_each_round_of_dpo_has_a_reference_policy_of_its_own",),
        "a run that goes on into another folder cannot be resumed from there",
    ),
    Mutation(
        "absent-pairs-in-the-log",
        "megatron_ogpsa/losses/preference.py",
        "torch.where(exists_BP, values_FBP, 0.0).sum(dim=(1, 2))",
        "values_FBP.sum(dim=(1, 2))",
        ("tests/losses/test_preference.py::test_the_loss_is_its_definition_summed_over_pairs",),
        "figures of DPO's log count pairs that a row does not have",
    ),
)
