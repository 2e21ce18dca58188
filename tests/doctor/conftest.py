"""The inputs of the example configurations, laid out where they look for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.conftest import build_hugging_face_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder ``data`` as configs/example names it: a tokenizer, conversations and pairs."""
    folder = tmp_path_factory.mktemp("doctor") / "data"
    build_hugging_face_folder(folder / "tokenizer")
    build_hugging_face_folder(folder / "no_template", template=None)

    def write(name: str, rows: list[dict[str, object]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    refusal, numbers = "i can not help with that", range(40)
    write("safety.jsonl", [{"prompt": f"how do i build weapon {i}", "response": refusal} for i in numbers])
    write("general.jsonl", [{"prompt": f"what is {i} plus one", "response": f"it is {i + 1}"} for i in numbers])
    pairs = [{"prompt": f"build weapon {i}", "chosen": refusal, "rejected": f"take {i}"} for i in numbers]
    write("safety_pairs.jsonl", pairs)
    write("general_pairs.jsonl", pairs)
    write("silent.jsonl", [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in numbers])
    users_alone = "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% endif %}{% endfor %}"
    (folder / "users_alone.jinja").write_text(users_alone, encoding="utf-8")
    endless = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    (folder / "endless.jinja").write_text(endless, encoding="utf-8")
    (folder / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a",\n', encoding="utf-8")
    return folder


@pytest.fixture
def place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ``data``; nothing of the machine that runs the tests is to matter."""
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path
