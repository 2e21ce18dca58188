"""``docs/launching.md``: its commands are accepted, and it names every flag."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from megatron_ogpsa.cli import train
from megatron_ogpsa.cluster.restarts import require_resumable
from megatron_ogpsa.cluster.settings import FLAGS, launch_settings
from megatron_ogpsa.configuration.config_file import ConfigFile

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/launching.md").read_text(encoding="utf-8")
STARTERS = ("launch/train.sh", "launch/train_nodes.sh", "launch/slurm.sbatch", "megatron_ogpsa.cli.main")
LINES = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]
EXPORTED = [assignment for line in LINES if line.startswith("export ") for assignment in line.split()[1:]]
COMMANDS = [line for line in LINES if not line.startswith("export ")]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_are_accepted(line: str) -> None:
    words = shlex.split(line, comments=True)
    start = next(position for position, word in enumerate(words) if word in STARTERS)
    script, given = words[start], words[start + 1 :]
    if script.startswith("launch/"):
        assert (ROOT / script).exists()
    else:
        assert given.pop(0) == "train"
    environment = dict(word.split("=") for word in words[:start] if re.match(r"[A-Z_]+=", word))
    if script == "launch/train_nodes.sh":
        environment |= dict(word.split("=") for word in EXPORTED)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(given)
    config = ConfigFile.read(ROOT / args.config)
    own, flags = train._split(args.flags)
    found = {key: value for key in FLAGS if (value := train._of(own, key) or train._of(args, key))}
    settings = launch_settings(found, config.launch, environment)
    require_resumable(config, flags, settings)

    from megatron_ogpsa.integration.arguments.loop import check_before_validation
    from megatron_ogpsa.integration.arguments.parser import build_parser

    megatron = build_parser()
    check_before_validation(megatron.parse_args(config.as_flags(megatron, flags)))


def test_the_page_names_every_flag_and_no_other() -> None:
    table = re.findall(r"^\| `--([a-z-]+)", TEXT, re.MULTILINE)
    assert table == list(FLAGS)
