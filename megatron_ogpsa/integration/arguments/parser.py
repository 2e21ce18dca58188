"""The ``--ogpsa-*`` flags, and Megatron's parser with them."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import torch

from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.cpu import set_cpu_defaults
from megatron_ogpsa.integration.arguments.gpu import set_gpu_defaults
from megatron_ogpsa.integration.runtime.cpu import install_if_no_gpu

WHOLE_SET = -1
"""Of ``--eval-iters``, our default: as many as the validation data have batches. Megatron's is 100, whatever they have."""

REFERENCE_LOSSES = ("nll", "nll_chosen", "nll_pair", "dpo")


def add_ogpsa_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this project's flags to Megatron's parser.

    For ``parse_and_validate_args(extra_args_provider=add_ogpsa_arguments)``. The defaults of Megatron's own flags change to
    what runs on this machine: without a GPU, or without Apex or Transformer Engine.
    """
    _add_data_arguments(parser.add_argument_group("ogpsa data", "What is trained, and on what"))
    _add_preference_arguments(parser.add_argument_group("ogpsa dpo", "The loss on preference pairs"))
    _add_projection_arguments(parser.add_argument_group("ogpsa projection", "Orthogonal gradient projection"))
    _add_watch_arguments(parser.add_argument_group("ogpsa watch", "Ranks that hang"))
    if install_if_no_gpu():  # before Megatron validates: it asks the GPU for its generation
        set_cpu_defaults(parser)
    elif torch.cuda.is_available():
        set_gpu_defaults(parser)
    return parser


def add_training_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our flags, and the defaults that fine-tuning wants of Megatron's.

    Checkpoints of a fine-tuning run are few, and worth a manifest. Dropout, which Megatron sets to 0.1, would thin out a
    model that was mostly trained without, and references with it.
    """
    add_ogpsa_arguments(parser)
    parser.set_defaults(
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        eval_interval=1000,
        eval_iters=WHOLE_SET,
        verify_integrity=True,
    )
    parser.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="Neither write manifests of checkpoints nor verify those that are loaded.",
    )
    return parser


def build_parser() -> argparse.ArgumentParser:
    """Megatron's own parser for ``megatron-ogpsa train``: what a configuration may name. Imports ``megatron.training``.

    A mistake raises :class:`UserError` in one line; Megatron's parser prints the usage of eight hundred flags.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = _QuietParser(prog="megatron-ogpsa train", allow_abbrev=False)
    add_megatron_arguments(parser)
    for action in parser._actions:  # one of Megatron's has a bare '10%', which argparse takes for a field
        action.help = _BARE_PERCENT.sub("%%", action.help) if action.help else action.help
    return add_training_arguments(parser)


def parse_flags(flags: list[str]) -> argparse.Namespace:
    """Parse without validating.

    Raises:
        UserError: a flag is unknown (the nearest known one is named) or its value is not of its type.
    """
    parser = build_parser()
    args, unknown = parser.parse_known_args(flags)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise UserError(f"unknown flag {unknown[0]}{nearest(unknown[0].partition('=')[0], known)}")
    return args


def nearest(name: str, known: Iterable[str]) -> str:
    """``", did you mean X?"`` for the known name that is most like ``name``, or nothing if none is."""
    matches = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {matches[0]}?" if matches else ""


_BARE_PERCENT = re.compile(r"(?<!%)%(?![%(])")


class _QuietParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """argparse knows what ``int`` raises; Megatron's types also look names up (KeyError) and evaluate (SyntaxError)."""
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError:
            raise
        except Exception as error:
            choices = ", ".join(str(getattr(choice, "name", choice)) for choice in action.choices or ())
            of = f" (one of {choices})" if choices else ""
            raise argparse.ArgumentError(action, f"invalid value: {arg_string!r}{of}") from error


def _add_data_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-stage",
        choices=("sft", "dpo"),
        default="sft",
        help="What megatron-ogpsa train does: supervised fine-tuning on conversations, or direct preference optimization "
        "on pairs of answers (default: sft).",
    )
    group.add_argument(
        "--ogpsa-train-data",
        metavar="SOURCE",
        help="A .jsonl or .parquet file, or a source that the datasets library loads. For sft with a 'messages' column or "
        "'prompt' and 'response' columns; for dpo with 'chosen' and 'rejected', and 'prompt' where they do not hold it.",
    )
    group.add_argument("--ogpsa-valid-data", metavar="SOURCE", help="Data for validation, in the same forms.")
    group.add_argument(
        "--ogpsa-packing",
        action="store_true",
        help="Pack several conversations (or pairs) into one sequence; attention stays within each conversation.",
    )


def _add_preference_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-dpo-loss",
        choices=("sigmoid", "hinge", "ipo"),
        default="sigmoid",
        help="Loss on the margin between the chosen and the rejected answer; ipo takes means over their tokens (default: "
        "sigmoid).",
    )
    group.add_argument(
        "--ogpsa-dpo-beta",
        metavar="BETA",
        type=float,
        default=0.2,
        help="Strength of the tie to the reference policy, the model as loaded (default: 0.2).",
    )
    group.add_argument(
        "--ogpsa-dpo-label-smoothing",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="Share of pairs whose order is taken to be wrong; sigmoid only (default: 0).",
    )
    group.add_argument(
        "--ogpsa-dpo-length-normalised",
        action="store_true",
        help="Compare mean log-probabilities per token instead of sums.",
    )
    group.add_argument(
        "--ogpsa-dpo-nll-weight",
        metavar="ALPHA",
        type=float,
        default=0.0,
        help="Add this times the chosen answer's mean token loss, as RPO does (default: 0).",
    )


def _add_projection_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-reference",
        metavar="NAME=SOURCE",
        action="append",
        default=[],
        type=_named_source,
        help="A general-capability data set whose gradient is protected; repeat it for several. Without any, the run is "
        "plain fine-tuning.",
    )
    group.add_argument(
        "--ogpsa-reference-samples",
        metavar="N",
        type=_positive_int,
        default=64,
        help="Samples of each reference from which its gradient is taken (default: 64).",
    )
    group.add_argument(
        "--ogpsa-rank-per-reference",
        metavar="M",
        type=_positive_int,
        default=1,
        help="Gradients of each reference, from as many disjoint parts of its samples: a larger subspace is protected, for "
        "as many times the basis' memory and no more passes over data (default: 1).",
    )
    _add_schedule_arguments(group)
    group.add_argument(
        "--ogpsa-energy",
        metavar="SHARE",
        type=_share,
        default=1.0,
        help="In each block keep the fewest leading directions that retain this share of every reference gradient's squared "
        "norm; less than all wants --ogpsa-mode orthogonal (default: 1, all directions).",
    )
    group.add_argument(
        "--ogpsa-reference-loss",
        metavar="[NAME=]LOSS",
        action="append",
        default=[],
        type=_named_loss,
        help="Loss whose gradient is protected, for all references or for the named one: nll of conversations (default for "
        "sft), nll_chosen (default for dpo), nll_pair (both answers) or dpo of preference pairs.",
    )
    group.add_argument(
        "--ogpsa-references-in-bf16",
        action="store_true",
        help="In a run with --fp8-format, take the reference gradients without FP8: nearer to what is to be protected, for "
        "the time and the activations of passes in bf16.",
    )
    _add_rule_arguments(group)
    _add_basis_arguments(group)
    group.add_argument(
        "--ogpsa-max-bad-refreshes",
        metavar="N",
        type=_positive_int,
        default=3,
        help="End the run, on all ranks, after so many refreshes in a row whose reference gradients are not finite; until "
        "then the last good basis is kept (default: 3). The first refresh of a run has none to keep, and must succeed.",
    )
    group.add_argument(
        "--ogpsa-max-bad-steps",
        metavar="N",
        type=_positive_int,
        default=10,
        help="End the run, on all ranks, after so many steps in a row that were skipped because the gradient is not finite; "
        "those that only a loss scale was too large for do not count (default: 10).",
    )
    group.add_argument(
        "--ogpsa-check-leak",
        action="store_true",
        help='Measure after each projection what it has left of what it is to remove, as the figure "ogpsa leak": rounding, '
        "of a gradient about 1e-7 of its norm, of an update what fp32 parameters cannot hold of so small a change. A second "
        "pass and one more all-reduce in every step; for the first steps on a new cluster.",
    )
    _add_authors_arguments(group)


def _add_basis_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-basis-dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="Storage of the basis on each rank (default: fp32).",
    )
    group.add_argument(
        "--ogpsa-basis-device",
        choices=("accelerator", "cpu"),
        default="accelerator",
        help="Keep the basis beside the gradient, or in host memory, from where each step streams it tile by tile "
        "(default: accelerator).",
    )


def _add_rule_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-granularity",
        choices=("tensor", "model"),
        default="tensor",
        help="Project each logical tensor on its own, or the whole model at once (default: tensor).",
    )
    group.add_argument(
        "--ogpsa-mode",
        choices=("conflict", "orthogonal"),
        help="Remove only what conflicts with the references, of which up to 8 gradients may be protected, or the whole "
        "component along them, which is the paper's rule and takes away what would help them too (default: conflict; "
        "orthogonal with --ogpsa-authors-rule and --ogpsa-authors-leak).",
    )
    group.add_argument(
        "--ogpsa-space",
        choices=("update", "gradient"),
        help="Project the gradient, which is the paper's rule, or the change of weights that the optimizer makes of it, "
        "momentum and weight decay included (default: update; gradient with --ogpsa-authors-rule and --ogpsa-authors-leak).",
    )


def _add_schedule_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-refresh-interval",
        metavar="N",
        type=_positive_int,
        help="Optimizer steps between two refreshes of the reference gradients (default: 30 for sft, 5 for dpo); steps that "
        "were skipped, as in fp16 until the loss scale fits, do not count.",
    )
    group.add_argument(
        "--ogpsa-early-refreshes",
        action=argparse.BooleanOptionalAction,
        help="Refresh after steps 1, 2, 4, 6, 9, ... as well, until the interval is reached: the weights move furthest at "
        "first (default: yes; no with --ogpsa-adaptive-interval, --ogpsa-authors-rule and --ogpsa-authors-leak).",
    )
    group.add_argument(
        "--ogpsa-refresh-warmup-iters",
        metavar="N",
        type=_count,
        default=0,
        help="Refresh before each of the first N steps, while the learning rate rises and the weights move furthest "
        "(default: 0).",
    )
    group.add_argument(
        "--ogpsa-adaptive-interval",
        metavar="SHARE",
        type=_proper_share,
        help="Adapt the interval so that at least this share of each reference gradient stays in the basis. It starts at one "
        "step, is halved when less was kept, and doubled, up to --ogpsa-refresh-interval, when less than a quarter of the "
        "allowed loss occurred.",
    )
    group.add_argument(
        "--ogpsa-stagger-references",
        action="store_true",
        help="Refresh one reference at a time, evenly spread over --ogpsa-refresh-interval, in place of all of them at its "
        "end; all at the start and after each checkpoint.",
    )


def _add_authors_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-authors-rule",
        action="store_true",
        help="For comparisons, the rule of the authors' released code: per tensor, both signs, at most two references, and "
        "in DPO the likelihood of chosen and rejected answers together (nll_pair) as their loss.",
    )
    group.add_argument(
        "--ogpsa-authors-leak",
        action="store_true",
        help="For comparisons, the mistake of the authors' released code: after each refresh but the first, add the "
        "reference gradients, divided by the micro-batches of a step, to the next update, unprojected.",
    )


def _add_watch_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--ogpsa-hang-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="End the run, with exit code 3 and a line that names the rank that is behind, when a rank has waited for so "
        "long in one collective; 0 for never (default: nine tenths of --distributed-timeout-minutes).",
    )


def _named_source(text: str) -> tuple[str, str]:
    name, separator, source = text.partition("=")
    if not (separator and name and source):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=SOURCE, for instance math=data/math.jsonl")
    return name, source


def _named_loss(text: str) -> tuple[str | None, str]:
    name, separator, loss = text.rpartition("=")
    if loss not in REFERENCE_LOSSES:
        raise argparse.ArgumentTypeError(f"'{text}' is not [NAME=]LOSS with one of {', '.join(REFERENCE_LOSSES)}")
    return (name if separator else None), loss


def _positive_int(text: str) -> int:
    value = int(text) if text.lstrip("+-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return value


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share over 0 and up to 1, such as 0.9")
    return value


def _proper_share(text: str) -> float:
    value = _share(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share between 0 and 1, such as 0.8: no basis stays whole")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds of at least 0")
    return value
