"""A table of facts that can only be known by heart: the capital of each country of the small world."""

from __future__ import annotations

from random import Random

from megatron_ogpsa.demo.tasks.base import Example, Task

_TABLE_SEED = 20260207

COUNTRIES = (
    "arvel", "bresk", "corin", "dalmor", "eskar", "fenwick", "gorlan", "hestia", "iberon", "jorvik", "kasmir", "lorna",
    "mardos", "nevara", "ostia", "pellon", "quarn", "rovenia", "sardan", "tolmek", "umbria", "vestan", "wolmar", "yelda",
)  # fmt: skip
CAPITALS = (
    "amber", "basil", "cedar", "dune", "ember", "fjord", "grove", "haven", "inlet", "jade", "knoll", "lagoon",
    "meadow", "north", "orchard", "pearl", "quartz", "ridge", "summit", "timber", "upland", "valley", "willow", "zenith",
)  # fmt: skip
PHRASINGS = (
    "what is the capital of {}",
    "name the capital of {}",
    "which city is the capital of {}",
    "the capital of {} is",
    "tell me the capital of {}",
    "{} has which capital",
    "in {} what is the capital",
    "where does {} have the capital",
)


def _table() -> dict[str, str]:
    """Countries to capitals in an order that nothing but the table gives away: both lists are alphabetical."""
    capitals = list(CAPITALS)
    Random(_TABLE_SEED).shuffle(capitals)
    return dict(zip(COUNTRIES, capitals, strict=True))


CAPITAL_OF = _table()


def draw_capital(rng: Random) -> Example:
    """``what is the capital of arvel`` gives one word."""
    country = rng.choice(COUNTRIES)
    return Example(rng.choice(PHRASINGS).format(country), CAPITAL_OF[country])


CAPITAL = Task(
    "capital",
    draw_capital,
    frozenset(COUNTRIES) | frozenset(CAPITALS) | {word for p in PHRASINGS for word in p.split() if word != "{}"},
)
