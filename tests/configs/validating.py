"""Validates configurations for clusters that are not there, as ``megatron-ogpsa plan`` does, with a GPU's defaults.

Standard input: a JSON list of [configuration, ranks, further flags]; standard output: for each, stage → arguments.
A process of its own: defaults are chosen as Megatron is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ogpsa.configuration.config_file import ConfigFile
from megatron_ogpsa.integration.runtime.cpu import install_on_meta

SHOWN = (
    "lr lr_decay_style weight_decay clip_grad global_batch_size train_iters train_samples bf16 fp8 fp8_recipe "
    "fp8_param_gather seq_length micro_batch_size data_parallel_size ogpsa_stage ogpsa_dpo_beta ogpsa_dpo_loss "
    "ogpsa_reference ogpsa_reference_loss ogpsa_reference_samples ogpsa_refresh_interval ogpsa_early_refreshes "
    "ogpsa_granularity ogpsa_space ogpsa_mode ogpsa_train_data"
).split()


def validated(config: str, ranks: int, flags: list[str]) -> dict[str, Any]:
    """Arguments of each stage by its name, '' for a single run; an error's text in place of a stage that is refused."""
    from megatron_ogpsa.cli.plan import _runs
    from megatron_ogpsa.errors import UserError
    from megatron_ogpsa.integration.arguments.parser import build_parser
    from megatron_ogpsa.planning.arguments import cluster_arguments

    parser = build_parser()
    stages: dict[str, Any] = {}
    for name, flags_of in _runs(ConfigFile.read(Path(config)), flags, None).items():
        try:
            args = cluster_arguments(flags_of(parser), ranks)
            stages[name] = {shown: getattr(args, shown) for shown in SHOWN}
        except UserError as error:
            stages[name] = str(error)
    return stages


if __name__ == "__main__":
    install_on_meta()
    print(json.dumps([validated(*given) for given in json.load(sys.stdin)]))
