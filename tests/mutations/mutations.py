"""Mistakes that someone could make in this project, and the tests that ought to notice each of them.

A mutation replaces one passage of one file. It still imports and runs: what only crashes shows nothing. Its tests are
few and on few ranks, so that all mutations together take some minutes.
"""

from __future__ import annotations

from dataclasses import dataclass

PARITY = "tests/core/test_parity.py::test_projected_gradient_equals_the_unsharded_one"
GRAM = "tests/core/test_parity.py::test_gram_matrices_are_bitwise_those_of_the_unsharded_model"
SIXTEEN_BIT = "tests/core/test_parity.py::test_sixteen_bit_training_projects_in_fp32"
NOT_FINITE = "tests/core/test_contract.py::test_what_is_not_finite_on_one_rank_is_decided_on_all"
DETACHED = "tests/core/test_contract.py::test_detached_or_disabled_leaves_megatron_as_it_was"
COLLECTIVES = "tests/core/test_contract.py::test_a_step_has_no_collective_more_and_a_refresh_has_one"
CONFLICT = "tests/core/test_rules.py::test_conflict_mode_gives_the_unsharded_solution"
ADDED = "tests/core/test_rules.py::test_references_are_added_to_one_step_unprojected"
UPDATES = "tests/core/test_update_space.py::test_weights_are_those_of_one_process"
MATHEMATICS = "tests/core/test_projection.py"
REFUSED_WITH_AUTHORS = "tests/core/test_support.py::test_what_is_not_the_authors_is_refused_with_their_rule"
PREFERENCE = "tests/losses/test_preference.py"
SHARDED_PREFERENCE = "tests/losses/test_sharded.py"
RESUMED = "tests/integration/test_train.py::test_a_resumed_run_is_bitwise_the_undisturbed_one"
PASSES = "tests/core/test_references.py::test_references_are_unsharded_gradients_and_leave_no_trace"
AUTHORS_LEAK = "tests/integration/test_dpo.py::test_the_authors_rule_and_their_leak"


@dataclass(frozen=True)
class Mutation:
    """One mistake.

    Attributes:
        path: the file, as seen from the project's folder.
        old: a passage that stands exactly once in it.
        new: what the mistake makes of it.
        tests: arguments of pytest; node ids, without options.
        why: what a person could have got wrong, in one line.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]
    why: str

    def applied_to(self, source: str) -> str:
        """``source`` with the mistake.

        Raises:
            ValueError: the passage is not there exactly once, so that the table must follow the code.
        """
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: its passage stands {source.count(self.old)} times in {self.path}")
        return source.replace(self.old, self.new)


COUNTING = (
    Mutation(
        "replicated-weight-counted-twice",
        "megatron_ogpsa/sharding/ownership.py",
        """    counted = param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(
        param,
        tp_group=getattr(optimizer, "tp_group", None),
        expert_tp_group=getattr(optimizer, "expert_tp_group", None),
    )
""",
        "    counted = param_is_not_shared(param)\n",
        (f"{GRAM}[tp2]",),
        "norm weights, which every tensor-parallel rank holds in full, enter sums once for each rank",
    ),
    Mutation(
        "tied-embedding-counted-twice",
        "megatron_ogpsa/sharding/ownership.py",
        "counted = param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(\n        param,",
        "counted = param_is_not_tensor_parallel_duplicate(\n        param,",
        (f"{GRAM}[pp2-tied]",),
        "both copies of a tied embedding, on the first and the last stage, enter sums",
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
        "megatron_ogpsa/spaces.py",
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
        "megatron_ogpsa/plugin.py",
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
        "megatron_ogpsa/spaces.py",
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
        "megatron_ogpsa/spaces.py",
        "        if not self._is_finite(squared_norm_B, before, trace):\n",
        "        if not all(bool(span.isfinite().all()) for span in self._shard.spans):\n",
        (f"{NOT_FINITE}[tp2-1]",),
        "a rank looks at its own gradient to see whether the step must be skipped",
    ),
    Mutation(
        "one-collective-more",
        "megatron_ogpsa/spaces.py",
        '        if self._norm is None:\n            return self._megatrons["get_grad_norm"]()\n        if clip_grads',
        "        if self._norm is not None or self.basis is None:\n"
        '            return self._megatrons["get_grad_norm"]()\n        if clip_grads',
        (f"{COLLECTIVES}[tp2-tensor]",),
        "the norm is asked of Megatron again, although the projection knows it: right, and an all-reduce more",
    ),
)

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
    gate = (("gate", query_rows),) if getattr(config, "attention_output_gate", False) else ()
    parts = (("q", query_rows), *gate, ("k", config.kv_channels), ("v", config.kv_channels))
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
        "    coefficients_BK = coefficients_BK.float()\n    for tile, rows_KT in _tiles_of(layout, rows_KN):\n",
        "    coefficients_BK = coefficients_BK.float()\n    for tile, rows_KT in _tiles_of(layout, rows_KN):\n"
        "        if tile.lengths_S is None and not tile.counted:\n            continue\n",
        (f"{MATHEMATICS}::test_copies_stay_bitwise_the_same_however_their_tiles_are_cut",),
        "copies that do not enter sums are not projected either, and drift away from the one that does",
    ),
)

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
        "megatron_ogpsa/plugin.py",
        "            row_N.div_(scale)\n",
        "            row_N.mul_(1.0)\n",
        (f"{GRAM}[tp2-fp16]",),
        "the loss scale of fp16 training is not divided out of references",
    ),
    Mutation(
        "packed-gradient-not-written-back",
        "megatron_ogpsa/spaces.py",
        "        self._shard.store()\n",
        "",
        (f"{SIXTEEN_BIT}[dp2-bf16-grads-tensor]",),
        "with bf16 gradients the packed copy is projected, and not what the optimizer reads",
    ),
)

STEP = (
    Mutation(
        "buffer-projected",
        "megatron_ogpsa/sharding/gradients.py",
        "        gradient: Tensor = getattr(self.holder, self.grad_name)\n",
        "        gradient: Tensor = self.main_grad\n",
        (f"{SIXTEEN_BIT}[dp2-bf16-grads-tensor]",),
        "Megatron's buffer is projected where the optimizer reads a copy that was made, and unscaled, before",
    ),
    Mutation(
        "norm-before-projection",
        "megatron_ogpsa/spaces.py",
        "self._norm = math.sqrt(after)",
        "self._norm = math.sqrt(before)",
        (f"{PARITY}[dp2]",),
        "clipping and the log get the norm that the gradient had before the projection",
    ),
    Mutation(
        "norm-only-of-what-is-removed",
        "megatron_ogpsa/projection/removal.py",
        "change_B = (removed_BK * (removed_BK - 2 * coefficients_BK)).sum(dim=-1)",
        "change_B = -removed_BK.square().sum(dim=-1)",
        (f"{ADDED}[dp2-plain-tensor]",),
        "Pythagoras where something is added that is not in the gradient",
    ),
    Mutation(
        "disabled-and-still-projecting",
        "megatron_ogpsa/spaces.py",
        "        if not self.enabled or self.basis is None:\n            return found_inf\n",
        "        if self.basis is None:\n            return found_inf\n",
        (f"{DETACHED}[dp2]",),
        "enabled = False is not looked at",
    ),
    Mutation(
        "detach-forgets-a-method",
        "megatron_ogpsa/spaces.py",
        "        for name in self.hooked:\n            self._optimizer.__dict__.pop(name, None)",
        "        for name in self.hooked[:-1]:\n            self._optimizer.__dict__.pop(name, None)",
        (f"{DETACHED}[dp2]",),
        "detach() leaves one of the optimizer's methods replaced",
    ),
    Mutation(
        "conflict-the-wrong-way-round",
        "megatron_ogpsa/projection/conflict.py",
        "violation_FB = (-slack_FB / size_B).clamp_min(0)",
        "violation_FB = (slack_FB / size_B).clamp_min(0)",
        (f"{MATHEMATICS}::test_conflict_mode_leaves_a_harmless_gradient_alone",),
        "what helps references is removed, and what hurts them stays",
    ),
    Mutation(
        "cone-of-updates-the-wrong-way-round",
        "megatron_ogpsa/spaces.py",
        "removed_BK = -basis.removed(-change_BK)",
        "removed_BK = basis.removed(change_BK)",
        (f"{UPDATES}[dp2-plain]",),
        "an update is taken for a gradient, against which it goes",
    ),
    Mutation(
        "updates-read-columns-without-padding",
        "megatron_ogpsa/sharding/gradients.py",
        "yield from (start + int(piece.main_grad.storage_offset()) - int(first) for piece in run)",
        "yield from accumulate((p.stop - p.start for p in run[:-1]), initial=start + 0 * int(first))",
        (f"{UPDATES}[dp2]",),
        "parameters are matched with the basis as if Megatron's buffer had no padding",
    ),
    Mutation(
        "updates-corrected-after-the-copy",
        "megatron_ogpsa/spaces.py",
        """        self._step(inner, self.basis, self._along_BK, self._norm)
        self._along_BK = None
        with _stepped_already(inner):
            return megatrons()

    def _step(self, inner: Sequence[torch.optim.Optimizer], basis: Basis, along_BK: Tensor, norm: float) -> None:
        parameters = self._shard.parameters
        before = [parameter.clone() for parameter in parameters] if self._check_leak else None
        for optimizer in inner:
            optimizer.step()
""",
        """        self._step(inner, self.basis, self._along_BK, self._norm)
        return True

    def _step(self, inner: Sequence[torch.optim.Optimizer], basis: Basis, along_BK: Tensor, norm: float) -> None:
        parameters = self._shard.parameters
        before = [parameter.clone() for parameter in parameters] if self._check_leak else None
        self._megatrons["step_with_ready_grads"]()
""",
        (f"{UPDATES}[dp2-bf16]",),
        "main parameters are corrected after Megatron has copied them to the model's own",
    ),
    Mutation(
        "references-added-to-every-step",
        "megatron_ogpsa/spaces.py",
        "        self.added_weight = 0.0\n        return must_skip",
        "        return must_skip",
        (f"{ADDED}[dp2-plain-tensor]",),
        "the authors' leak, once asked for, goes on",
    ),
)

REFRESH = (
    Mutation(
        "stale-basis",
        "megatron_ogpsa/plugin.py",
        "        self._space.basis = None  # its memory serves the new one\n"
        "        self._space.needs_refresh = False\n        self._space.basis = Basis(\n",
        "        self._space.basis = self._space.basis or Basis(\n",
        (f"{UPDATES}[dp2]",),
        "the first basis stays in use whatever later refreshes bring",
    ),
    Mutation(
        "refresh-in-the-basis-own-memory",
        "megatron_ogpsa/plugin.py",
        "        self._captured_KN = self._rows(len(self.reference_names))\n",
        "        basis = self._space.basis\n"
        "        self._captured_KN = self._rows(0) if basis is None else basis.rows_KN\n",
        (f"{NOT_FINITE}[tp2-1]",),
        "new references overwrite the basis in use: memory for one less, and nothing to keep if they are not finite",
    ),
    Mutation(
        "reference-that-is-not-finite-taken",
        "megatron_ogpsa/plugin.py",
        "        self.rejected_references = self._not_finite(gram_BKK, names)\n",
        "        self.rejected_references = self._not_finite(gram_BKK.nan_to_num_(), names)\n",
        (f"{NOT_FINITE}[tp2-1]",),
        "a reference with NaN is taken for one that is zero",
    ),
    Mutation(
        "references-not-zeroed-between",
        "megatron_ogpsa/references.py",
        "                    _zero_gradients(chunks, optimizer)\n                    run(",
        "                    if len(sums) == 1:\n                        _zero_gradients(chunks, optimizer)\n"
        "                    run(",
        (f"{PASSES}[dp2-overlap]",),
        "each reference's gradient has those before it in it",
    ),
    Mutation(
        "reference-gradient-left-behind",
        "megatron_ogpsa/references.py",
        "                ogpsa.capture(name)\n    _zero_gradients(chunks, optimizer)\n",
        "                ogpsa.capture(name)\n",
        (f"{PASSES}[dp2-overlap]",),
        "the last reference's gradient stays in Megatron's buffers, for whoever accumulates into them next",
    ),
    Mutation(
        "references-captured-before-finalisation",
        "megatron_ogpsa/references.py",
        '        settings += [(config, "timers", None), (config, "calculate_per_token_loss", True)]\n',
        '        settings += [(config, "timers", None), (config, "calculate_per_token_loss", True)]\n'
        '        settings += [(config, "finalize_model_grads_func", None)]\n',
        (f"{PASSES}[tp2-sp]",),
        "reference gradients are taken before they are reduced over ranks and divided by the number of tokens",
    ),
    Mutation(
        "tracked-random-states-not-restored",
        "megatron_ogpsa/references.py",
        "        get_cuda_rng_tracker().set_states(tracked)\n",
        "        tracked.clear()\n",
        (f"{PASSES}[dp2-overlap]",),
        "a refresh draws from Megatron's tensor-parallel random states, so that dropout differs after it",
    ),
    Mutation(
        "router-buffers-not-restored",
        "megatron_ogpsa/references.py",
        "                buffer.copy_(value)\n",
        "                value.copy_(buffer)\n",
        (f"{PASSES}[ep2-sigmoid-bias]",),
        "reference tokens move the experts' bias",
    ),
    Mutation(
        "router-metrics-not-restored",
        "megatron_ogpsa/references.py",
        "        tracker._metrics = saved\n",
        "        saved.update(tracker._metrics)\n        tracker._metrics = saved\n",
        (f"{PASSES}[ep2-sigmoid-bias]",),
        "auxiliary losses of reference passes are added to those that the log shows",
    ),
    Mutation(
        "refresh-one-step-late",
        "megatron_ogpsa/integration/projection.py",
        "is_regular = step % self._ogpsa.config.refresh_interval == 0",
        "is_regular = (step - 1) % self._ogpsa.config.refresh_interval == 0",
        (AUTHORS_LEAK,),
        "off by one: a refresh every interval, and one step after it is due",
    ),
    Mutation(
        "no-refresh-at-the-start",
        "megatron_ogpsa/integration/projection.py",
        "        self._refresh_is_due = True\n        self._refresh_seconds = 0.0\n",
        "        self._refresh_is_due = False\n        self._refresh_seconds = 0.0\n",
        (f"{RESUMED}[dp2-update-space]",),
        "a run that resumes between two refreshes has no basis until the next",
    ),
    Mutation(
        "no-refresh-after-a-checkpoint",
        "megatron_ogpsa/integration/projection.py",
        '        """Note that a resumed run would refresh now."""\n        self._refresh_is_due = True\n',
        '        """Note that a resumed run would refresh now."""\n',
        (f"{RESUMED}[dp2-update-space]",),
        "a resumed run refreshes where the undisturbed one does not",
    ),
)

AUTHORS_AND_LOSSES = (
    Mutation(
        "leak-at-the-first-refresh",
        "megatron_ogpsa/integration/authors.py",
        "is_leaking = args.ogpsa_authors_leak and step > 0 and step % interval == 0",
        "is_leaking = args.ogpsa_authors_leak and step % interval == 0",
        (AUTHORS_LEAK,),
        "the authors' leak begins one refresh too early",
    ),
    Mutation(
        "authors-rule-with-three-references",
        "megatron_ogpsa/integration/authors.py",
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
)

INTERVAL = "tests/core/test_interval.py::test_staleness_and_first_order_change_are_those_of_the_whole_model"

TOLD = (
    Mutation(
        "change-told-of-one-shard",
        "megatron_ogpsa/plugin.py",
        "                tables.append(along_BK - self._along_BK)",
        "                tables.append((along_BK - self._along_BK) / self._shard.reduction.group.size())",
        (f"{INTERVAL}[tp2-pp2-tensor]",),
        "the movement along the basis is averaged over ranks where it is a sum",
    ),
    Mutation(
        "change-told-with-the-new-basis",
        "megatron_ogpsa/plugin.py",
        "            if along_BK is not None and self._along_BK is not None:",
        "            self._along_BK = None if self._along_BK is None else torch.zeros_like(self._along_BK)\n"
        "            if along_BK is not None and self._along_BK is not None:",
        (f"{INTERVAL}[dp2-plain-tensor]",),
        "the weights are taken for what the steps have changed of them",
    ),
    Mutation(
        "staleness-of-lengths",
        "megatron_ogpsa/plugin.py",
        "        captured_K = with_old_BKJ.square().sum(dim=(0, 2)) / energy_K",
        "        captured_K = (with_old_BKJ.square().sum(dim=(0, 2)) / energy_K).sqrt()",
        (f"{INTERVAL}[dp2-plain-tensor]",),
        "a share of lengths is told for a share of energy",
    ),
    Mutation(
        "reference-losses-of-one-rank",
        "megatron_ogpsa/references.py",
        "    dist.all_reduce(table_K2, group=parallel_state.get_data_parallel_group(with_context_parallel=True))\n",
        "",
        (f"{PASSES}[dp2-overlap]",),
        "a reference's loss is that of one data-parallel rank's share of its samples",
    ),
    Mutation(
        "references-undone-together",
        "megatron_ogpsa/references.py",
        "            with no_trace(chunks):  # of each on its own: otherwise one would route the next one's tokens\n",
        "            with no_trace(chunks) if reference is references[-1] else _random_states():\n",
        ("tests/core/test_references.py::test_a_reference_does_not_depend_on_those_before_it",),
        "what a reference's pass does to the experts' bias is undone after the last one only",
    ),
    Mutation(
        "parts-of-a-reference-overlap",
        "megatron_ogpsa/references.py",
        "self.micro_batches[part * length : (part + 1) * length]",
        "self.micro_batches[: (part + 1) * length]",
        ("tests/core/test_references.py::test_parts_of_a_reference_are_gradients_of_disjoint_samples[dp2]",),
        "each part of a reference has the samples of those before it",
    ),
    Mutation(
        "sequences-cut-in-halves",
        "megatron_ogpsa/integration/context_parallel.py",
        "    own: dict[str, torch.Tensor] = get_batch_on_this_cp_rank(fields, is_hybrid_cp=False, cp_group=group)",
        "    own = {name: value.chunk(group.size(), dim=1)[group.rank()] for name, value in fields.items()}",
        ("tests/integration/test_context_parallel.py",),
        "context-parallel ranks get halves of a sequence, while attention takes them for its first and last quarter",
    ),
)

MUTATIONS: tuple[Mutation, ...] = (
    *COUNTING,
    *REDUCTIONS,
    *BLOCKS,
    *PRECISION,
    *STEP,
    *REFRESH,
    *TOLD,
    *AUTHORS_AND_LOSSES,
)
