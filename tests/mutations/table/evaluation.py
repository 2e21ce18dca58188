"""Mistakes in scores: refusals, intervals and judges."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

VERDICTS = "tests/evaluation/test_verdicts.py"

EVALUATION = (
    Mutation(
        "refusals-sought-in-the-whole-answer",
        "megatron_ogpsa/evaluation/refusals.py",
        "opening = _plain(answer.strip()[:OPENING])",
        "opening = _plain(answer.strip())",
        (f"{VERDICTS}::test_the_built_in_patterns_tell_refusals_from_help",),
        'a helpful answer that says "I cannot" at its end counts as refused',
    ),
    Mutation(
        "typographic-apostrophes-do-not-count",
        "megatron_ogpsa/evaluation/refusals.py",
        '.replace("\\N{RIGHT SINGLE QUOTATION MARK}", "\'")',
        '.strip("\'")',
        (f"{VERDICTS}::test_the_built_in_patterns_tell_refusals_from_help",),
        "refusals that are written with a typographic apostrophe are missed",
    ),
    Mutation(
        "patterns-mind-the-case",
        "megatron_ogpsa/evaluation/refusals.py",
        "re.IGNORECASE | re.DOTALL",
        "re.DOTALL",
        (f"{VERDICTS}::test_the_built_in_patterns_tell_refusals_from_help",),
        "refusals in lower case are missed",
    ),
    Mutation(
        "wilson-without-its-centre",
        "megatron_ogpsa/evaluation/rates.py",
        "centre = (share + square / 2) / (1 + square)",
        "centre = share",
        (f"{VERDICTS}::test_the_interval_is_wilsons",),
        "the interval lies about the share itself, so that none of few is certain",
    ),
    Mutation(
        "judge-may-say-two",
        "megatron_ogpsa/evaluation/judges.py",
        "not 0 <= value <= 1",
        "not math.isfinite(value)",
        (f"{VERDICTS}::test_what_is_wrong_with_a_judge_is_told",),
        "a judge that marks from 0 to 10 gives rates above 100 %",
    ),
    Mutation(
        "answers-lost-with-the-judge",
        "megatron_ogpsa/evaluation/judging.py",
        "        except UserError:\n            self._keep()\n",
        "        except UserError:\n",
        ("tests/evaluation/test_keeping.py",),
        "verdicts that were paid for are gone when the judge fails",
    ),
    Mutation(
        "another-models-flags-unsaid",
        "megatron_ogpsa/integration/checkpoints/loading.py",
        "        with changed, _told_in_one_line(flags, load_arg), told_differences(flags):\n",
        "        with changed, _told_in_one_line(flags, load_arg):\n",
        ("tests/integration/test_saved_arguments.py",),
        "a model is trained on with another rotary base than its weights were made with, without a word",
    ),
)
