"""docs/flags.md: every flag of ours, as ``--help`` has it. ``python -m tests.adoption.flags_page`` writes it anew."""

from __future__ import annotations

import argparse
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/flags.md"

_HEAD = """# Flags

Those that this project adds to Megatron's, as `megatron-ogpsa train CONFIG.yaml --help` prints them; a script with
`add_ogpsa_arguments` has them too. `python -m tests.adoption.flags_page` writes this page.
"""

_LOSSES = """
With h = (log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x)), of the chosen answer y_w and the rejected y_l:

| `--ogpsa-dpo-loss` | |
|---|---|
| `sigmoid` | −(1−ε)·log σ(βh) − ε·log σ(−βh), DPO ([arXiv:2305.18290](https://arxiv.org/abs/2305.18290)) |
| `hinge` | max(0, 1 − βh) ([arXiv:2309.06657](https://arxiv.org/abs/2309.06657)) |
| `ipo` | (h − 1/(2β))² ([arXiv:2310.12036](https://arxiv.org/abs/2310.12036)), of means over tokens, as TRL has it |

β is `--ogpsa-dpo-beta`, ε `--ogpsa-dpo-label-smoothing`; `--ogpsa-dpo-nll-weight` α adds α times the chosen answer's mean
token loss (RPO, [arXiv:2404.19733](https://arxiv.org/abs/2404.19733)). log π_ref is computed once, before the first step, and
kept in `reference_log_probs.safetensors` beside the checkpoints: there is no second model.
"""

_TAIL = """
## What `megatron-ogpsa train` changes of Megatron's defaults

| Flag | Here | Megatron's |
|---|---|---|
| `--attention-dropout`, `--hidden-dropout` | 0 | 0.1 |
| `--calculate-per-token-loss` | on | off |
| `--eval-iters` | the whole of `--ogpsa-valid-data` | 100 |
| `--verify-integrity` | on; `--no-verify-integrity` | off |

Where Apex or Transformer Engine is missing, or there is no GPU, the defaults of the fusions that need them are off too.
"""


def page() -> str:
    """The page's text, of the parser as it is."""
    from megatron_ogpsa.integration.arguments.parser import build_parser

    parts = [_HEAD]
    for group in build_parser()._action_groups:
        if (group.title or "").startswith("ogpsa"):
            rows = [_row(action) for action in group._group_actions]
            parts.append("\n".join([f"\n## {group.description}\n", "| Flag | |", "|---|---|", *rows]) + "\n")
            parts.append(_LOSSES if group.title == "ogpsa dpo" else "")
    return "".join(parts) + _TAIL


def _row(action: argparse.Action) -> str:
    value = "" if action.nargs == 0 else f" {action.metavar or '|'.join(map(str, action.choices or ()))}"
    flag = f"`{action.option_strings[0]}{value}`".replace("|", r"\|")
    return f"| {flag} | {action.help} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
