"""Mistakes in reading what nobody has checked."""

from __future__ import annotations

from tests.mutations.mutation import Mutation

BAD_INPUT = "tests/untrusted/test_fixtures.py::test_bad_files"

UNTRUSTED = (
    Mutation(
        "yaml-without-a-limit",
        "megatron_ogpsa/configuration/yaml_nodes.py",
        "content = file.read(_MOST_BYTES + 1)",
        "content = file.read(_MOST_BYTES)",
        (BAD_INPUT,),
        "a configuration of any size is read as far as the limit, and the rest is lost without a word",
    ),
    Mutation(
        "yaml-nested-values-unfold",
        "megatron_ogpsa/configuration/yaml_nodes.py",
        "return [_scalar(place, item) for item in node.value]",
        "return [value_of(place, item) for item in node.value]",
        (BAD_INPUT,),
        "lists of aliases of lists of aliases unfold without end",
    ),
)
