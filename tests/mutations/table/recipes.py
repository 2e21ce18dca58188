"""Mistakes in what is taken of public data sets."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

RECIPES = "tests/data/recipes/test_recipes.py"

RECIPE = (
    Mutation(
        "worse-safe-response-learnt",
        "megatron_ogpsa/data/recipes/saferlhf.py",
        "if all(is_safe) else is_safe.index(True)",
        "if not all(is_safe) else is_safe.index(True)",
        (f"{RECIPES}::test_rows_become_what_training_reads",),
        "of two safe responses the first is learnt, and of one safe one the better, which may not be safe",
    ),
    Mutation(
        "unsafe-response-preferred",
        "megatron_ogpsa/data/recipes/saferlhf.py",
        '"chosen": responses[chosen], "rejected": responses[1 - chosen]',
        '"chosen": responses[1 - chosen], "rejected": responses[chosen]',
        (f"{RECIPES}::test_rows_become_what_training_reads",),
        "preference pairs stand the wrong way round",
    ),
    Mutation(
        "rows-taken-twice",
        "megatron_ogpsa/data/recipes/selection.py",
        "            seen.add(digest)\n",
        "            seen.discard(digest)\n",
        (f"{RECIPES}::test_rows_become_what_training_reads",),
        "rows that stand in a data set twice are taken twice",
    ),
    Mutation(
        "sample-favours-late-rows",
        "megatron_ogpsa/data/recipes/selection.py",
        "elif (place := generator.randrange(fit)) < num_rows:",
        "elif (place := generator.randrange(num_rows)) < num_rows:",
        (f"{RECIPES}::test_the_sample_depends_on_the_seed_alone_and_is_even",),
        "every later row takes the place of an earlier one, so that the sample is the data set's end",
    ),
)
