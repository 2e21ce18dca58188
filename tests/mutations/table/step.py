"""Mistakes in an optimizer step."""

from __future__ import annotations

from tests.mutations.mutation import Mutation
from tests.mutations.table.tests_named import ADDED, DETACHED, MATHEMATICS, PARITY, SIXTEEN_BIT, UPDATES

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
        "megatron_ogpsa/plugin/gradient_space.py",
        "self._norm, self._norm_there = math.sqrt(after), numbers[-1:]",
        "self._norm, self._norm_there = math.sqrt(before), numbers[:1]",
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
        "megatron_ogpsa/plugin/space.py",
        "        if not self.enabled or self.basis is None:\n            return found_inf\n",
        "        if self.basis is None:\n            return found_inf\n",
        (f"{DETACHED}[dp2]",),
        "enabled = False is not looked at",
    ),
    Mutation(
        "detach-forgets-a-method",
        "megatron_ogpsa/plugin/space.py",
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
        "megatron_ogpsa/plugin/update_space.py",
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
        "megatron_ogpsa/plugin/update_space.py",
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
        "megatron_ogpsa/plugin/gradient_space.py",
        "        self.added_weight = 0.0\n        return must_skip",
        "        return must_skip",
        (f"{ADDED}[dp2-plain-tensor]",),
        "the authors' leak, once asked for, goes on",
    ),
    Mutation(
        "copies-look-for-overflow-alone",
        "megatron_ogpsa/plugin/space.py",
        "        if shard.reduction.holds_copies:\n",
        "        if not shard.reduction.holds_copies:\n",
        ("tests/core/test_contract.py::test_what_is_not_finite_on_one_rank_is_decided_on_all[dp2-fp16-plain-0]",),
        "in fp16 a copy of the model whose gradient overflows skips alone, and the others wait for it",
    ),
)
