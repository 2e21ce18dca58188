"""``base: OTHER.yaml``: a file takes over another one's flags, and its own win; mistakes are named where they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write(text, base=...)``: both files, in folders of their own."""

    def written(text: str, base: str = "lr: 1.0e-6\nseed: 1\nlaunch:\n  nproc-per-node: 8\n") -> Path:
        (tmp_path / "shared").mkdir(exist_ok=True)
        (tmp_path / "shared/base.yaml").write_text(base, encoding="utf-8")
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def test_own_keys_win_and_know_their_file(write: Write, tmp_path: Path) -> None:
    config = ConfigFile.read(write("base: shared/base.yaml\nseed: 2\nstages:\n  sft:\n    lr: 1.0e-3\n"))
    assert [(entry.key, entry.value, entry.place) for entry in config.entries] == [
        ("lr", "1.0e-6", f"{tmp_path}/shared/base.yaml:1"),
        ("seed", "2", f"{tmp_path}/run.yaml:2"),
    ]
    assert config.launch == {"nproc-per-node": "8"}
    assert {entry.key: entry.value for entry in config.stage("sft").entries} == {"seed": "2", "lr": "1.0e-3"}
    own = ConfigFile.read(write("base: shared/base.yaml\nlaunch:\n  nproc-per-node: 2\n"))
    assert own.launch == {"nproc-per-node": "2"}


@pytest.mark.parametrize(
    ("text", "base", "words"),
    [
        ("base: [a.yaml]\n", None, "{0}/run.yaml:1: base: write one path, as seen from {0}"),
        ("base:\n", None, "{0}/run.yaml:1: base: write one path"),
        ("seed: 1\nbase: nowhere.yaml\n", None, "{0}/run.yaml:2: base: no such file {0}/nowhere.yaml: "),
        ("base: a\nbase: b\n", None, "{0}/run.yaml:2: base stands there twice"),
        (
            "base: shared/base.yaml\n",
            "seed: 1\nbase: other.yaml\n",
            "{0}/shared/base.yaml:2: base in a base ({0}/run.yaml:1: base): give it in run.yaml itself",
        ),
        ("base: shared/base.yaml\n", "stages:\n  sft:\n    lr: 1\n", "{0}/shared/base.yaml:1: stages in a base"),
        ("base: shared/base.yaml\n", "- 1\n", "{0}/shared/base.yaml: not a mapping"),
        ("base: shared\n", None, "{0}/shared: not a regular file"),
    ],
)
def test_mistakes_are_named(write: Write, tmp_path: Path, text: str, base: str | None, words: str) -> None:
    path = write(text) if base is None else write(text, base)
    with pytest.raises(UserError) as caught:
        ConfigFile.read(path)
    assert str(caught.value).startswith(words.format(tmp_path))


def test_an_unknown_key_of_the_base_is_named_in_the_base(write: Write, tmp_path: Path) -> None:
    from megatron_ogpsa.integration.arguments.parser import build_parser

    config = ConfigFile.read(write("base: shared/base.yaml\n", "lr: 1.0e-6\nseeed: 1\n"))
    with pytest.raises(UserError, match=rf"^{tmp_path}/shared/base\.yaml:2: unknown key 'seeed', did you mean"):
        config.as_flags(build_parser(), [])
