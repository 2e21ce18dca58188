"""``--help`` of ``train``: its own, or all flags where a configuration is named."""

from __future__ import annotations

import pytest

from megatron_ogpsa.cli import main as entry

ALL_FLAGS = (
    "train a.yaml --help",
    "train a.yaml --lr 1 -h",
    "train --nnodes 1 a.yaml --help",  # launch/train.sh a.yaml --help
    "train --nnodes=1 --stage sft a.yaml --help",
)
OWN = ("train --help", "train --nnodes 1 --help", "train --nnodes --help", "evaluate a.yaml --help", "train -h")


@pytest.mark.parametrize("line", [*ALL_FLAGS, *OWN])
def test_what_is_listed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(entry, "_show_flags", lambda: print("all flags") or 0)
    if line in ALL_FLAGS:
        assert entry.main(line.split()) == 0
        assert capsys.readouterr().out == "all flags\n"
    else:
        with pytest.raises(SystemExit) as ended:
            entry.main(line.split())
        assert ended.value.code == 0
        assert f"megatron-ogpsa {line.split()[0]}" in capsys.readouterr().out
