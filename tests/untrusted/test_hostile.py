"""Files that execute code when the wrong function reads them: here they are refused, and the code has not run."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml

from megatron_ogpsa.reference_policy.store import read_log_probs
from megatron_ogpsa.system.files import read_sealed_json
from tests.data.conftest import chat
from tests.untrusted.conftest import read_chats, read_config, read_sentencepiece, read_tokenizer, refusal, spoil

SHELL = 'touch "$MARKER"'
CODE = "import os\n\nopen(os.environ['MARKER'], 'w').close()\n"


class Bomb:
    """Runs :data:`SHELL` when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        """What pickle calls."""
        return os.system, (SHELL,)


PICKLED = pickle.dumps(Bomb())

READERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": read_chats,
    "rows.json": read_chats,
    "rows.parquet": read_chats,
    "rows.pkl": read_chats,
    "run.yaml": read_config,
    "tiny.model": read_sentencepiece,
    "log_probs.safetensors": read_log_probs,
    "stage.json": lambda path: read_sealed_json(path, remedy="restore it"),
}


@pytest.mark.parametrize("name", READERS)
def test_pickled_code_under_each_name(tmp_path: Path, marker: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PICKLED)
    refusal(READERS[name], tmp_path / name)


@pytest.mark.parametrize("name", READERS)
def test_an_array_of_pickled_objects_under_each_name(tmp_path: Path, marker: Path, name: str) -> None:
    with (tmp_path / name).open("wb") as file:
        np.save(file, np.array([Bomb()], dtype=object), allow_pickle=True)
    refusal(READERS[name], tmp_path / name)


YAML_CALLS = (
    f"lr: !!python/object/apply:os.system ['{SHELL}']",
    f"lr: !!python/object/apply:subprocess.check_output [[sh, -c, '{SHELL}']]",
    f"lr: !!python/object/new:os.system ['{SHELL}']",
    f"? !!python/object/apply:os.system ['{SHELL}']\n: 1",
    f"stages: {{sft: {{lr: !!python/object/apply:os.system ['{SHELL}']}}}}",
    f"launch: !!python/object/apply:os.system ['{SHELL}']",
)


@pytest.mark.parametrize("text", YAML_CALLS)
def test_yaml_that_calls(tmp_path: Path, marker: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text + "\n", encoding="utf-8")
    refusal(read_config, path)


TEMPLATES = (
    "{{ cycler.__init__.__globals__.os.system('" + SHELL + "') }}",
    "{{ raise_exception.__globals__['__builtins__']['open'](path, 'w') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('" + SHELL + "') }}",
)


@pytest.mark.parametrize("text", TEMPLATES)
def test_templates_that_reach_out(tokenizer_folder: Path, tmp_path: Path, marker: Path, text: str) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    spoil(tmp_path / "tokenizer", {"chat_template.jinja": text})
    refusal(read_tokenizer, tmp_path / "tokenizer")


def test_a_tokenizer_that_brings_code(tokenizer_folder: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    for name in ("custom.py", "tokenization_custom.py", "__init__.py", "setup.py"):
        (folder / name).write_text(CODE + "class Custom: pass\n", encoding="utf-8")
    code = {"auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}, "tokenizer_class": "Custom"}
    spoil(folder, {"tokenizer_config.json": code, "config.json": {"auto_map": {"AutoConfig": "custom.Custom"}}})
    assert "contains custom code" in refusal(read_tokenizer, folder)
    spoil(folder, {"tokenizer.json": None})
    assert "contains custom code" in refusal(read_tokenizer, folder)


def test_a_folder_with_a_script_for_datasets(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    for name in ("chats.py", "__init__.py"):
        (folder / name).write_text(CODE, encoding="utf-8")
    assert "is a directory" in refusal(read_chats, folder)
    assert "unknown kind of file '.py'" in refusal(read_chats, folder / "chats.py")


def test_a_script_beside_a_saved_set_is_left_alone(tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "chats"
    datasets.Dataset.from_list([chat("Hi", "Hello")]).save_to_disk(folder)
    (folder / "chats.py").write_text(CODE, encoding="utf-8")
    assert read_chats(folder)


def test_the_bombs_do_go_off_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests above would show nothing."""
    for number, explode in enumerate(
        (
            lambda: pickle.loads(PICKLED),  # noqa: S301
            lambda: yaml.load(YAML_CALLS[0], Loader=yaml.UnsafeLoader),
            lambda: subprocess.run([sys.executable, "-c", CODE], check=True),
        )
    ):
        path = tmp_path / str(number)
        monkeypatch.setenv("MARKER", str(path))
        explode()
        assert path.exists()
