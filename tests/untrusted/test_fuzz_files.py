"""Whatever is in a file: it is read, or refused in one line. Nothing else is raised, and nothing goes on without end.

Bounded: each reader gets a few dozen files, the same ones in every run, in some 15 s together. ``OGPSA_FUZZ_EXAMPLES=5000``
in the environment gives each reader as many, new ones in every run. What these found is kept in :data:`FOUND`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.data import load_chat_tokenizer
from megatron_ogpsa.data.extras import extras_from_row
from megatron_ogpsa.data.messages import messages_from_row
from megatron_ogpsa.data.preferences import pair_from_row
from megatron_ogpsa.data.sources import open_source
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.arguments.parser import build_parser
from megatron_ogpsa.reference_policy.store import LogProbs, read_log_probs, write_log_probs
from megatron_ogpsa.system.files import read_sealed_json, write_sealed_json
from tests.data.conftest import build_hugging_face_folder, build_sentencepiece_model

EXAMPLES = int(os.environ.get("OGPSA_FUZZ_EXAMPLES", "0"))
CHAT = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello"}]
ROWS = [{"messages": CHAT}, {"prompt": "a", "response": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
CONFIG = (
    b"num-layers: 2\nlr: 1.0e-5\nogpsa-reference: {a: a.jsonl}\nlaunch: {nproc-per-node: 2}\nstages:\n  sft: {lr: 1}\n"
)

Read = Callable[[Path], object]


def bounded(examples: int) -> settings:
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def is_read_or_refused(read: Read, path: Path) -> object:
    try:
        return read(path)
    except UserError as error:
        message = str(error)
    assert message.isprintable(), message
    return None


@st.composite
def edits(draw: st.DrawFn) -> list[tuple[str, float, bytes]]:
    """Up to four edits of a file: what is done, where (0 to 1 of its length), and with which bytes."""
    kinds = st.sampled_from(["cut", "flip", "overwrite", "insert", "remove", "repeat", "zero"])
    places = st.floats(0, 1, exclude_max=True)
    return draw(st.lists(st.tuples(kinds, places, st.binary(min_size=1, max_size=12)), min_size=1, max_size=4))


def edited(content: bytes, changes: list[tuple[str, float, bytes]]) -> bytes:
    for kind, place, data in changes:
        at = int(place * len(content))
        after = content[at + len(data) :]
        content = {
            "cut": content[:at],
            "flip": content[:at]
            + bytes(a ^ (1 << b % 8) for a, b in zip(content[at:], data[:1], strict=False))
            + content[at + 1 :],
            "overwrite": content[:at] + data + after,
            "insert": content[:at] + data + content[at:],
            "remove": content[:at] + after,
            "repeat": content[:at] + content[at : at + 40] * len(data) + content[at:],
            "zero": content[:at] + bytes(len(data)) + after,
        }[kind]
    return content


def read_rows(path: Path) -> object:
    return [
        is_read_or_refused(lambda _: check(row, where), path)  # noqa: B023  # called at once
        for where, row in open_source(str(path)).rows()
        for check in (messages_from_row, pair_from_row, extras_from_row)
    ]


_parser = build_parser()


def read_config(path: Path) -> object:
    config = ConfigFile.read(path)
    return [one.as_flags(_parser, []) for one in (config, *map(config.stage, config.stages))]


def use_tokenizer(kind: str, path: Path, template: Path | None) -> object:
    tokenizer = load_chat_tokenizer(kind, str(path), str(template) if template else None)
    token_ids, _ = tokenizer.encode_chat(CHAT)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in token_ids)
    return tokenizer.fingerprint, tokenizer.eos_ids, tokenizer.decode(token_ids)


class Target:
    """A whole file, and what reads it when it has been edited."""

    def __init__(self, file: Path, read: Read, given_to: Path | None = None) -> None:
        self.file, self.read, self.given_to = file, read, given_to or file
        self.whole = file.read_bytes()

    def try_with(self, content: bytes) -> object:
        self.file.unlink()  # what maps the file of the example before keeps it
        self.file.write_bytes(content)
        return is_read_or_refused(self.read, self.given_to)

    def restore(self) -> None:
        self.file.unlink()
        self.file.write_bytes(self.whole)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("fuzz")

    def written(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    pq.write_table(pa.Table.from_pylist(ROWS * 5), folder / "rows.parquet")
    saved, tokenizer = folder / "saved", build_hugging_face_folder(folder / "tokenizer")
    datasets.Dataset.from_list(ROWS * 5).save_to_disk(saved)
    template = written("template.jinja", b"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    model = build_sentencepiece_model(folder)
    log_probs = LogProbs.unknown(9, weights="ab" * 8, data=("one", "two"), settings={"bf16": "True"})
    write_log_probs(
        folder / "log_probs.safetensors", log_probs.with_round(torch.ones(9, 2).double(), torch.arange(9) < 4)
    )
    write_sealed_json(folder / "sealed.json", {"settings": {"lr": "1", "é": None}, "n": [1, 2.5]}, remedy="")
    hugging_face, sentencepiece = "HuggingFaceTokenizer", "SentencePieceTokenizer"
    return {
        "config": Target(written("config.yaml", CONFIG), read_config),
        "lines": Target(written("rows.jsonl", lines), read_rows),
        "array": Target(written("rows.json", json.dumps(ROWS, indent=1).encode()), read_rows),
        "parquet": Target(folder / "rows.parquet", read_rows),
        "arrow": Target(next(saved.glob("*.arrow")), read_rows, saved),
        "arrow state": Target(saved / "state.json", read_rows, saved),
        "arrow features": Target(saved / "dataset_info.json", read_rows, saved),
        "tokenizer": Target(
            tokenizer / "tokenizer.json", lambda path: use_tokenizer(hugging_face, path, None), tokenizer
        ),
        "tokenizer settings": Target(
            tokenizer / "tokenizer_config.json", lambda path: use_tokenizer(hugging_face, path, None), tokenizer
        ),
        "sentencepiece": Target(model, lambda path: use_tokenizer(sentencepiece, path, template)),
        "template": Target(template, lambda path: use_tokenizer(hugging_face, tokenizer, path)),
        "log-probabilities": Target(folder / "log_probs.safetensors", read_log_probs),
        "sealed JSON": Target(folder / "sealed.json", lambda path: read_sealed_json(path, remedy="delete it")),
    }


NAMES = [
    *("config", "lines", "array", "parquet", "arrow", "arrow state", "arrow features"),
    *("tokenizer", "tokenizer settings", "sentencepiece", "template", "log-probabilities", "sealed JSON"),
]


@pytest.mark.parametrize("name", NAMES)
@bounded(100)
@given(changes=edits())
def test_an_edited_file(targets: dict[str, Target], name: str, changes: list[tuple[str, float, bytes]]) -> None:
    target = targets[name]
    content = edited(target.whole, changes)
    try:
        found = target.try_with(content)
    finally:
        target.restore()
    if name in ("log-probabilities", "sealed JSON") and found is not None:
        assert _same(found, target.read(target.given_to)), "a change was not noticed"


def _same(one: object, other: object) -> bool:
    if isinstance(one, LogProbs) and isinstance(other, LogProbs):
        return (
            one.values_N2.equal(other.values_N2)
            and one.is_known_N.equal(other.is_known_N)
            and (one.weights, one.data) == (other.weights, other.data)
        )
    return one == other


@pytest.mark.parametrize("name", NAMES)
@bounded(50)
@given(content=st.binary(max_size=200))
def test_any_bytes(targets: dict[str, Target], name: str, content: bytes) -> None:
    target = targets[name]
    try:
        target.try_with(content)
    finally:
        target.restore()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    "messages prompt response chosen rejected role content name tool_calls tools chat_template_kwargs".split()
)
MESSAGES = st.dictionaries(FIELDS, VALUES | st.sampled_from(["user", "assistant", "system", "tool"]), max_size=4)


@bounded(300)
@given(row=st.dictionaries(FIELDS, VALUES | st.lists(MESSAGES, max_size=3), max_size=4) | VALUES)
def test_any_row(targets: dict[str, Target], row: object) -> None:
    targets["lines"].try_with(json.dumps(row).encode() + b"\n")
    for read in (messages_from_row, pair_from_row, extras_from_row):
        is_read_or_refused(lambda _, read=read: read(row, "rows.jsonl:1"), Path())


KEYS = st.sampled_from("lr bf16 save stages launch --stages ogpsa-reference seq-length help -h <<".split()) | st.text(
    max_size=6
)
TAGS = st.sampled_from(["", "", "", "!!int ", "!!python/name:os.system ", "!!binary ", "!x ", "&a ", "*a #"])
SCALARS = st.sampled_from(
    ["1", "1e-6", "true", "~", "'x'", "2024-13-45", "0x", "--help", "-1", ".inf", "<<", "? x", "[", "- "]
)
YAML = st.lists(
    st.tuples(
        st.sampled_from(["", "  ", "\t"]),
        KEYS,
        st.sampled_from([": ", ":", ": |\n "]),
        TAGS,
        SCALARS | st.text(max_size=6),
    ),
    max_size=6,
).map(lambda lines: "\n".join("".join(parts) for parts in lines))


@bounded(300)
@given(text=YAML)
def test_any_configuration(targets: dict[str, Target], text: str) -> None:
    targets["config"].try_with(text.encode(errors="surrogatepass"))


JINJA_WORDS = (
    "{{ }} {% %} for m in messages endfor if endif m.content m.role ( ) [ ] | length tojson list join generation "
    "endgeneration set x = namespace range 99999 * ** 9 ~ 'x' + . __class__ cycler raise_exception macro call endmacro"
)
JINJA = st.lists(st.sampled_from(JINJA_WORDS.split()), max_size=12).map(" ".join)


@bounded(300)
@given(text=JINJA)
def test_any_template(targets: dict[str, Target], text: str) -> None:
    target = targets["template"]
    target.try_with(text.encode())


FOUND: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a template that Python does not compile": (
        "template",
        lambda _: b"".join(b"{%% for a%d in [1] %%}" % i for i in range(30)) + b"{% endfor %}" * 30,
    ),
    "a template whose parentheses nest too deeply": (
        "template",
        lambda _: b"{{ " + b"(" * 3000 + b"1" + b")" * 3000 + b" }}",
    ),
    "a template with a number of 5000 digits": ("template", lambda _: b"{{ " + b"9" * 5000 + b" }}"),
    "a template that calls itself": ("template", lambda _: b"{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"),
    "a template that writes half a surrogate pair": ("template", lambda _: b"{{ '\\ud83d' }}"),
    "a template that Jinja folds into a name that is none": ("template", lambda _: b"{{ (1e308 * 10) | int }}"),
    "a configuration with a date that is none": ("config", lambda _: b"seq-length: 2024-13-45\n"),
    "a configuration with a zero byte": ("config", lambda _: b"lr: \x00\n"),
    "a configuration that asks for help": ("config", lambda _: b"help: true\n"),
    "a configuration whose list begins with a flag": ("config", lambda _: b"ogpsa-reference: ['--help']\n"),
    "a key with a line end": ("config", lambda _: b'"a\\nb\\e[31m": 1\n'),
    "Arrow offsets beyond the file's end": ("arrow", lambda whole: whole[: len(whole) // 2]),
    "sealed JSON that nests too deeply to be written again": (
        "sealed JSON",
        lambda _: b'{"sha256": "", "x": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    ),
    "log-probabilities of a kind that NumPy has not": (
        "log-probabilities",
        lambda whole: whole.replace(b'"F64"', b'"I64"'),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(targets: dict[str, Target], name: str) -> None:
    target = targets[FOUND[name][0]]
    try:
        assert target.try_with(FOUND[name][1](target.whole)) is None or name.startswith(
            ("a configuration with a date",)
        )
    finally:
        target.restore()


def test_whole_files_are_read(targets: dict[str, Target]) -> None:
    assert [*targets] == NAMES
    for target in targets.values():
        assert target.try_with(target.whole) is not None
