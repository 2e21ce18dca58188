"""Language: sentences of a small probabilistic grammar, scored by loss."""

from __future__ import annotations

from random import Random

from megatron_ogpsa.demo.tasks.base import Example, Task

# What each subject tends to do, and what it does it to. A subject's first verb is its favourite; so is a verb's first object.
VERBS_OF = {
    "cat": ("watches", "chases", "finds"),
    "dog": ("chases", "carries", "finds"),
    "child": ("draws", "finds", "carries"),
    "farmer": ("carries", "grows", "watches"),
    "baker": ("sells", "carries", "grows"),
    "painter": ("draws", "sells", "watches"),
}
OBJECTS_OF = {
    "watches": ("river", "bird", "field"),
    "chases": ("bird", "ball", "leaf"),
    "finds": ("ball", "leaf", "river"),
    "draws": ("field", "river", "bird"),
    "carries": ("bread", "ball", "wheat"),
    "grows": ("wheat", "leaf", "field"),
    "sells": ("bread", "wheat", "ball"),
}
ADJECTIVES = ("small", "old", "quiet", "happy")
ADVERBS = ("slowly", "again", "early", "gladly")
ENDINGS = ("and goes home", "and sings a song", "and takes a rest")
_FAVOURITE_FIRST = (6, 3, 1)


def draw_sentence(rng: Random) -> Example:
    """``write about the cat`` gives ``the old cat watches the river again and goes home``, or another such sentence."""
    subject = rng.choice(tuple(VERBS_OF))
    verb = rng.choices(VERBS_OF[subject], weights=_FAVOURITE_FIRST)[0]
    thing = rng.choices(OBJECTS_OF[verb], weights=_FAVOURITE_FIRST)[0]
    ending = rng.choices(ENDINGS, weights=_FAVOURITE_FIRST)[0]
    sentence = f"the {rng.choice(ADJECTIVES)} {subject} {verb} the {thing} {rng.choice(ADVERBS)} {ending}"
    return Example(f"write about the {subject}", sentence)


def _words() -> frozenset[str]:
    lists = (
        VERBS_OF,
        OBJECTS_OF,
        *OBJECTS_OF.values(),
        ADJECTIVES,
        ADVERBS,
        (word for e in ENDINGS for word in e.split()),
    )
    return frozenset(word for words in lists for word in words) | {"write", "about", "the"}


LANGUAGE = Task("language", draw_sentence, _words(), has_one_answer=False)
