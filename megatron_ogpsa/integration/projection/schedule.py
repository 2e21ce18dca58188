"""When references are refreshed in Megatron's loop, and which of them: arithmetic on numbers that all ranks share.

| | all at once | in turns (``--ogpsa-stagger-references``) |
|---|---|---|
| at the start, early (``--ogpsa-early-refreshes``), after each checkpoint | all | all |
| in between | all, every interval | one of J references, every interval / J, rounded up |

Steps are those that were taken. One that was skipped has moved no weight; in fp16 some 20 are at first, and refreshes would
else stand close while nothing changes, and far apart when it does.

With ``--ogpsa-adaptive-interval`` the interval follows how stale the basis was found to be. It begins with the shortest:
nothing is known at the start, and Adam's first steps move the weights furthest. A run that resumes has no basis to compare
with at its first refresh, so that refreshes which follow a checkpoint decide nothing in any run; they begin a new
interval, and a new round of turns. All that a checkpoint has to keep is then the interval in force, beside the
number of steps that were skipped. With dropout the masks of
a reference's passes differ from refresh to refresh, which looks like staleness: a bound near 1 then keeps the interval short.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_ogpsa.references.steps import early_refreshes, next_refresh
from megatron_ogpsa.refusal import Refusal, refuse

if TYPE_CHECKING:
    from megatron_ogpsa.plugin.interval import ReferenceInterval


class RefreshSchedule:
    """The steps at which one run refreshes.

    Args:
        longest: steps from one gradient of a reference to its next, at most.
        turns: references that take turns within an interval; 1 for all at once.
        bound: share of each fresh reference gradient that the basis is to hold still; None leaves the interval as it is.
        early: whether all are refreshed after 1, 2, 4, 6, 9, … steps as well; not with ``bound``, which begins with
            the shortest.
        warmup: before each of so many steps all are refreshed; likewise.

    Attributes:
        interval: the one in force.
        turn: of the reference whose turn is next.
    """

    def __init__(
        self, longest: int, *, turns: int = 1, bound: float | None = None, early: bool = False, warmup: int = 0
    ) -> None:
        self._longest, self._turns, self._bound = longest, turns, bound
        self.interval = longest if bound is None else self._shortest
        self.turn = 0
        self._early, self._warmup = early, warmup
        self._early_steps = early_refreshes(longest, early=early, warmup=warmup)
        self._captured: float | None = None  # the least in this round
        self._next = 0

    @property
    def _shortest(self) -> int:
        """In which every reference gets its turn."""
        return min(self._turns, self._longest)

    @property
    def spacing(self) -> int:
        """Steps from one refresh to the next."""
        return -(-self.interval // self._turns)

    @property
    def round(self) -> int:
        """Steps until every reference was refreshed once."""
        return self.spacing * self._turns

    @property
    def longest_spacing(self) -> int:
        """The same, where the interval is as long as it may become."""
        return -(-self._longest // self._turns)

    @property
    def longest_round(self) -> int:
        """Steps until every reference was refreshed once, at most."""
        return self.longest_spacing * self._turns

    def is_due(self, step: int) -> bool:
        """Whether references are to be refreshed after ``step`` steps, whatever else asks for it."""
        return step >= self._next

    def is_of_all(self, step: int) -> bool:
        """Whether a refresh that is due then is of all references, also where they take turns."""
        return step in self._early_steps

    def restart(self, step: int) -> None:
        """All were refreshed because a run starts, a checkpoint was saved or the basis was lost."""
        self.turn, self._captured = 0, None
        self.postpone(step)

    def advance(self, step: int, captured: float | None) -> None:
        """Those that were due were refreshed.

        Args:
            captured: the least share that the basis held of one of them, see :func:`least_captured`; None if that is not
                known.
        """
        known = [share for share in (self._captured, captured) if share is not None]
        self._captured = min(known, default=None)
        self.turn = (self.turn + 1) % self._turns
        if self.turn == 0:
            if self._bound is not None and self._captured is not None:
                self.interval = adapted(self.interval, self._captured, self._bound, self._shortest, self._longest)
            self._captured = None
        self.postpone(step)

    def postpone(self, step: int) -> None:
        """The same are due again, one spacing later: their gradients were not finite."""
        if self._turns == 1 and self._bound is None:
            # Refreshes stand at multiples of the interval, whatever checkpoints add between them.
            self._next = next_refresh(step, self.interval, early=self._early, warmup=self._warmup)
        else:
            self._next = min([step + self.spacing, *(early for early in self._early_steps if early > step)])

    def state(self) -> dict[str, int]:
        """What a checkpoint has to keep."""
        return {"interval": self.interval} if self._bound is not None else {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on with the interval of the run whose :meth:`state` it is, within what this run asks for."""
        if self._bound is not None:
            self.interval = min(state.get("interval", self._shortest), self._longest)

    def __str__(self) -> str:
        told = "one refreshed" if self._turns > 1 else "refreshed"
        told += f" every {self.spacing} steps" + (", in turns" if self._turns > 1 else "")
        of_all = "all " if self._turns > 1 else ""
        if self._warmup > 1:
            told += f", {of_all}before each of the first {self._warmup}"
        if later := [step for step in self._early_steps if step >= self._warmup]:
            told += f", and {of_all}after {', '.join(map(str, later))}"
        if self._bound is None:
            return told
        return f"{told}, and up to {self.longest_spacing} as long as {100 * self._bound:g}% stays protected"


def adapted(interval: int, captured: float, bound: float, shortest: int, longest: int) -> int:
    """The next interval: half if less than ``bound`` was captured, double if hardly anything was lost, else the same.

    A gradient that turns steadily loses the square of its angle: twice the steps lose at most four times as much. So the
    interval is doubled where under a quarter of what the bound allows was lost, and the doubled one keeps the bound too:
    halving and doubling do not take turns for ever.
    """
    if captured < bound:
        return max(shortest, interval // 2)
    if 1 - captured < (1 - bound) / 4:
        return min(longest, 2 * interval)
    return interval


def least_captured(references: Iterable[Sequence[str]], interval: Mapping[str, ReferenceInterval]) -> float | None:
    """The share that the basis still held of the reference that it held least of; None if no share is known. Collective.

    The least and not the mean: each reference is to be protected, and one with a large gradient would hide the others.
    A reference of several gradients counts with their mean, which is also what the log says. All ranks read these shares off
    one all-reduce; that processors of several kinds may round them differently must not make ranks part.

    Args:
        references: names of each reference's gradients.
    """
    shares = [
        sum(interval[name].captured for name in names) / len(names)
        for names in references
        if all(name in interval for name in names)
    ]
    # NaN: of a gradient that is zero.
    least = min((share for share in shares if not math.isnan(share)), default=math.inf)
    agreed = torch.tensor([least], dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return agreed.item() if math.isfinite(agreed.item()) else None


def schedule_from_arguments(args: argparse.Namespace) -> RefreshSchedule:
    """As the flags say, once they have been checked."""
    return RefreshSchedule(
        args.ogpsa_refresh_interval,
        turns=len(args.ogpsa_reference) if args.ogpsa_stagger_references else 1,
        bound=args.ogpsa_adaptive_interval,
        early=args.ogpsa_early_refreshes,
        warmup=args.ogpsa_refresh_warmup_iters,
    )


_WAITING = "references that wait for their turn come back out of the basis, "
_ADAPTIVE = "--ogpsa-adaptive-interval {0.ogpsa_adaptive_interval} with "


def _truncates(args: argparse.Namespace) -> bool:
    return args.ogpsa_energy < 1.0


def _adapts(args: argparse.Namespace) -> bool:
    return args.ogpsa_adaptive_interval is not None


WITH_SCHEDULES = (
    Refusal(
        "--ogpsa-stagger-references with one --ogpsa-reference",
        "there is nothing to take turns",
        applies=lambda args: args.ogpsa_stagger_references and len(args.ogpsa_reference) < 2,
    ),
    Refusal(
        "--ogpsa-stagger-references with --ogpsa-basis-dtype {0.ogpsa_basis_dtype}",
        _WAITING + "whose rounding would blur what tells them apart",
        "use fp32, with --ogpsa-basis-device cpu if memory is short",
        lambda args: args.ogpsa_stagger_references and args.ogpsa_basis_dtype != "fp32",
    ),
    Refusal(
        "--ogpsa-stagger-references with --ogpsa-energy {0.ogpsa_energy}",
        _WAITING + "which would not hold all of them",
        "use one of the two",
        lambda args: args.ogpsa_stagger_references and _truncates(args),
    ),
    Refusal(
        "--ogpsa-energy {0.ogpsa_energy} with --ogpsa-mode conflict",
        "its cone has a side for every whole reference",
        "use --ogpsa-mode orthogonal, or leave it out",
        lambda args: _truncates(args) and args.ogpsa_mode == "conflict",
    ),
    Refusal(
        _ADAPTIVE + "--ogpsa-energy {0.ogpsa_energy}",
        "a fresh basis may hold no more than that",
        "ask for a smaller share, or keep more energy",
        lambda args: _adapts(args) and _truncates(args) and args.ogpsa_energy <= args.ogpsa_adaptive_interval,
    ),
    Refusal(
        _ADAPTIVE + "--ogpsa-early-refreshes",
        "an interval that adapts begins with one step by itself",
        "leave the latter out",
        lambda args: _adapts(args) and args.ogpsa_early_refreshes,
    ),
    Refusal(
        _ADAPTIVE + "--ogpsa-refresh-warmup-iters",
        "the interval adapts from the start",
        "leave the latter out",
        lambda args: _adapts(args) and args.ogpsa_refresh_warmup_iters,
    ),
    Refusal(
        _ADAPTIVE + "--ogpsa-refresh-interval 1",
        "no interval is shorter",
        "give the longest interval that you want",
        lambda args: _adapts(args) and args.ogpsa_refresh_interval == 1,
    ),
    Refusal(
        _ADAPTIVE
        + "--ogpsa-refresh-interval {0.ogpsa_refresh_interval} and a checkpoint every {0.shortest_save} steps",
        "the interval cannot adapt: each checkpoint begins it anew, and adapting takes more than {0.decides_after} steps",
        "save less often, or give a shorter --ogpsa-refresh-interval",
        lambda args: _adapts(args) and args.shortest_save is not None and args.shortest_save <= args.decides_after,
    ),
)
"""Of this module's options, and of bases that are cut. ``shortest_save`` and ``decides_after`` are steps."""


def check_schedule_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not go with the options of this module and with ``--ogpsa-energy``.

    Raises:
        UnsupportedError: naming both flags.
    """
    saves = [n for n in (args.save_interval, args.non_persistent_save_interval) if args.save and n]
    asked = argparse.Namespace(
        **vars(args), shortest_save=min(saves, default=None), decides_after=schedule_from_arguments(args).longest_round
    )
    refuse(WITH_SCHEDULES, asked, scope="")
