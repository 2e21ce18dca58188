"""Data in Megatron's loop, flags that it wants, and what a preference loss depends on."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

_DPO = "tests/integration/test_dpo.py"
_BAD_INPUT = "tests/integration/test_bad_input.py"

IN_THE_LOOP = (
    Mutation(
        "reference-policy-of-another-model",
        "megatron_ogpsa/integration/reference_policy.py",
        "            agreed(lambda: self._check_settings(known, (*MODEL_ARGUMENTS, *PRECISION_ARGUMENTS)))\n",
        "",
        (f"{_DPO}::test_the_reference_policy_goes_on_where_it_stopped_and_knows_its_data",),
        "log-probabilities of a model with another rope base or precision are taken for this one's",
    ),
    Mutation(
        "evaluation-before-the-reference-policy-is-read",
        "megatron_ogpsa/integration/loop/hooks.py",
        "            hook.before_evaluation(iteration)\n",
        "            pass\n",
        (f"{_DPO}::test_the_result_of_fine_tuning_is_the_reference_policy",),
        "a run of DPO that has taken all its steps fails in the evaluation that Megatron still makes",
    ),
    Mutation(
        "ipo-of-sums",
        "megatron_ogpsa/losses/preference.py",
        'return self.length_normalised or self.kind == "ipo"',
        "return self.length_normalised",
        ("tests/losses/test_against_trl.py",),
        "IPO compares sums over answers, whose margin is reached at once",
    ),
    Mutation(
        "evaluations-move-on",
        "megatron_ogpsa/integration/inputs/sampling.py",
        "        position = index % self._window\n",
        "        position = index % self._num_samples\n",
        ("tests/integration/test_sampling.py",),
        "each evaluation takes other samples, as Megatron's do",
    ),
    Mutation(
        "one-stage-refuses-alone",
        "megatron_ogpsa/integration/projection/run.py",
        "        agreed(lambda: check_supported(optimizer, model, config))",
        "        check_supported(optimizer, model, config)",
        ("tests/integration/test_not_finite.py::test_layers_of_one_stage_that_are_refused_end_all_stages",),
        "a pipeline stage whose layers are refused ends by itself, and the others wait for it",
    ),
    Mutation(
        "later-stages-unchecked",
        "megatron_ogpsa/cli/train.py",
        "        args = parse_flags(later.flags(parser))\n        check_parsed(args)\n",
        "        args = parse_flags(later.flags(parser))\n",
        ("tests/integration/test_pipeline.py::test_a_mistake_in_the_last_stage_is_told_before_the_first_one_trains",),
        "what DPO cannot do with is told after all of SFT",
    ),
    Mutation(
        "seeds-share-epochs",
        "megatron_ogpsa/integration/inputs/sampling.py",
        "SeedSequence((seed, epoch))",
        "SeedSequence(seed + epoch)",
        ("tests/integration/test_sampling.py",),
        "the second epoch of one seed is the first of the next",
    ),
    Mutation(
        "fusion-without-apex",
        "megatron_ogpsa/integration/arguments/gpu.py",
        "        parser.set_defaults(gradient_accumulation_fusion=False)\n",
        "        pass\n",
        ("tests/integration/test_gpu_arguments.py",),
        "on a GPU without Apex every run ends when its output layer is built",
    ),
    Mutation(
        "main-parameters-of-rounded-weights",
        "megatron_ogpsa/integration/checkpoints/loading.py",
        '            settings["load_main_params_from_ckpt"] = True\n',
        "            pass\n",
        (
            "tests/transformer_engine/test_fp8.py::test_a_loaded_model_begins_from_weights_before_rounding[tensorwise-tp2]",
        ),
        "training with FP8 weights begins from a model that is 2.6 % off the one that was loaded",
    ),
    Mutation(
        "another-schedule-in-a-traceback",
        "megatron_ogpsa/integration/checkpoints/loading.py",
        "        if remedy := _other_schedule(error):\n",
        '        if remedy := "":\n',
        (f"{_BAD_INPUT}::test_a_run_that_goes_on_with_another_schedule_is_told_how",),
        "a run that is to go on for longer ends in Megatron's assertion",
    ),
    Mutation(
        "flags-that-megatron-misses-in-an-assertion",
        "megatron_ogpsa/integration/arguments/loop.py",
        "    for name, meaning in wanted.items():\n",
        "    for name, meaning in _WANTED.items():\n",
        (f"{_BAD_INPUT}::test_what_megatron_misses_in_an_assertion_is_asked_for",),
        "a configuration without a learning rate ends in a TypeError of Megatron's",
    ),
    Mutation(
        "results-of-a-call-that-was-cut-off",
        "megatron_ogpsa/benchmarks/on_gpu.py",
        "        if exit_code is not None and one.unfinished(args.folder).exists():\n",
        "        if one.unfinished(args.folder).exists():\n",
        ("tests/benchmarks/test_on_gpu.py::test_what_is_left_is_for_the_next_call",),
        "a measurement that was cut off counts as done",
    ),
    Mutation(
        "second-patch-passed-over",
        "megatron_ogpsa/integration/runtime/patching.py",
        "            if _applied[patch.target] != patch.reason:\n",
        "            if patch.target is None:\n",
        ("tests/integration/test_patching.py::test_a_second_patch_of_one_target_is_an_error",),
        "of two patches of one function the second is passed over without a word",
    ),
    Mutation(
        "rows-run-on-into-each-other",
        "megatron_ogpsa/integration/inputs/batch.py",
        "    is_start = torch.ones_like(document_ids, dtype=torch.bool)",
        "    is_start = torch.arange(document_ids.numel()).view_as(document_ids) == 0",
        ("tests/integration/test_sampling.py::test_documents_end_with_their_row_and_padding_is_one_of_them",),
        "the first document of a packed row is taken for the rest of the row before it",
    ),
)
