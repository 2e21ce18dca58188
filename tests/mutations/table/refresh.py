"""Mistakes in a refresh of the references."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import AUTHORS_LEAK, NOT_FINITE, PASSES, RESUMED, UPDATES

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
        "megatron_ogpsa/integration/schedule.py",
        "self._next = (step // self.interval + 1) * self.interval if is_regular",
        "self._next = (step // self.interval + 1) * self.interval + 1 if is_regular",
        (AUTHORS_LEAK,),
        "off by one: a refresh every interval, and one step after it is due",
    ),
    Mutation(
        "interval-not-restored",
        "megatron_ogpsa/integration/projection.py",
        'self._schedule.restore(before.get("schedule", {}))',
        'before.get("schedule", {})',
        ("tests/integration/test_train.py::test_a_resumed_run_takes_turns_and_adapts_as_the_undisturbed_one",),
        "a resumed run begins with the longest interval again",
    ),
    Mutation(
        "turns-go-on-over-a-checkpoint",
        "megatron_ogpsa/integration/schedule.py",
        "        self.turn, self._captured = 0, None",
        "        self._captured = None",
        ("tests/integration/test_schedule.py::test_a_resumed_run_refreshes_as_the_undisturbed_one",),
        "the undisturbed run goes on with the next reference, the resumed one with the first",
    ),
    Mutation(
        "kept-references-transposed",
        "megatron_ogpsa/plugin.py",
        "basis.reference_BKK[:, :, of_names]",
        "basis.reference_BKK.mT[:, :, of_names]",
        ("tests/core/test_rules.py::test_references_that_wait_for_their_turn_come_out_of_the_basis[tp2-config0]",),
        "references that wait for their turn come out of the basis by the transposed coordinates",
    ),
    Mutation(
        "energy-of-any-reference",
        "megatron_ogpsa/projection/basis.py",
        "(held_BKK >= energy_BK[:, :, None]).all(dim=1)",
        "(held_BKK >= energy_BK[:, :, None]).any(dim=1)",
        ("tests/core/test_rules.py::test_a_basis_is_cut_by_energy[tp2]",),
        "a basis is cut as soon as it holds enough of one reference, whatever is left of the others",
    ),
    Mutation(
        "no-refresh-at-the-start",
        "megatron_ogpsa/integration/projection.py",
        "        self._refresh_is_due = True\n        self._refresh_seconds = 0.0\n",
        "        self._refresh_is_due = False\n        self._refresh_seconds = 0.0\n",
        (f"{RESUMED}[dp2-energy]",),
        "a run that resumes between two refreshes has no basis until the next",
    ),
    Mutation(
        "no-refresh-after-a-checkpoint",
        "megatron_ogpsa/integration/projection.py",
        '        """Note that a resumed run would refresh now."""\n        self._refresh_is_due = True\n',
        '        """Note that a resumed run would refresh now."""\n',
        (f"{RESUMED}[dp2-energy]",),
        "a resumed run refreshes where the undisturbed one does not",
    ),
)
