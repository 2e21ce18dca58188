"""``megatron-ogpsa plan`` as its page shows it, and its answers to mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/planning.md"
DOCUMENTED = dict(re.findall(r"```console\n\$ megatron-ogpsa (.*)\n((?s:.*?))\n```", PAGE.read_text(encoding="utf-8")))

EIGHT_B = "plan configs/llama3.1-8b/sft.yaml"
PIPELINE = "plan configs/example/sft-dpo.yaml --gpus-per-node 4 --vocab-size 1000"
AS_JSON = (f"{EIGHT_B} --json", f"{EIGHT_B} --json --ogpsa-basis-dtype bf16 --ogpsa-basis-device cpu")
PAPER = "plan configs/qwen2.5-7b/sft-dpo.yaml --json"
IN_BF16 = f"{EIGHT_B} --fp8-format hybrid --ogpsa-references-in-bf16"
ADAPTIVE = f"{EIGHT_B} --ogpsa-adaptive-interval 0.9 --ogpsa-packing --micro-batch-size 1"
OFFLOADED = f"{EIGHT_B} --use-precision-aware-optimizer --json"
OFFLOADED_ALL = (
    f"{OFFLOADED} --optimizer-cpu-offload --optimizer-offload-fraction 1.0 --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
)
RESHARDABLE = f"{EIGHT_B} --dist-ckpt-optim-fully-reshardable"
RESHARDABLE_CP = f"{RESHARDABLE} --context-parallel-size 2"
RESHARDABLE_EP = (
    f"{RESHARDABLE} --num-experts 8 --expert-model-parallel-size 4 --expert-tensor-parallel-size 1 "
    "--moe-token-dispatcher-type alltoall --json"
)
UPDATE = f"{EIGHT_B} --json --ogpsa-space update --ogpsa-granularity model"

MISTAKES = {
    f"{EIGHT_B} --fp8-format hybrid --seq-length 2052": "--seq-length 2052 with --micro-batch-size 4 gives a rank 4104 ",
    f"{EIGHT_B} --micro-batch-sise 1": "unknown flag --micro-batch-sise, did you mean --micro-batch-size?",
    f"{EIGHT_B} --stage dpo": "--stage dpo: configs/llama3.1-8b/sft.yaml has no 'stages': leave the flag out",
    "plan configs/example/sft.yaml --gpus-per-node 4": "--vocab-size is missing: give it, or a tokenizer that tells it ",
    "plan configs/nowhere.yaml": "configs/nowhere.yaml: no such file",
    f"{PIPELINE} --stage rlhf": "--stage rlhf: the file has the stages sft, dpo",
    f"{EIGHT_B} --num-layers-per-virtual-pipeline-stage 4": "Megatron refuses these flags on 8 ranks: ",
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[int, str, str]]:
    """Of all commands below, run in one process."""
    commands = [*DOCUMENTED, PIPELINE, *AS_JSON, UPDATE, PAPER, IN_BF16, ADAPTIVE, OFFLOADED, OFFLOADED_ALL]
    commands += [EIGHT_B, RESHARDABLE, RESHARDABLE_CP, RESHARDABLE_EP, *MISTAKES]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.planning.several"],
        input=json.dumps([command.split() for command in commands]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(commands, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", DOCUMENTED)
def test_the_page_shows_what_the_command_prints(outcomes: dict[str, tuple[int, str, str]], command: str) -> None:
    code, out, err = outcomes[command]
    assert (out or err) == DOCUMENTED[command] + "\n"  # a progress bar may have been on stderr
    assert code == (2 if "megatron-ogpsa: error:" in DOCUMENTED[command] else 0)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_told_in_one_line(outcomes: dict[str, tuple[int, str, str]], command: str) -> None:
    code, out, err = outcomes[command]
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith(f"megatron-ogpsa: error: {MISTAKES[command]}")


def test_each_stage_of_a_pipeline_is_planned(outcomes: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = outcomes[PIPELINE]
    assert code == 0
    assert re.findall(r"stage (\w+), on 1 node with 4 GPUs", out) == ["sft", "dpo"]


def test_references_in_bf16_may_take_twice_the_time(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """The 11.5 % of the page are 0.130 of a step's passes in a refresh."""
    code, out, _ = outcomes[IN_BF16]
    assert code == 0
    assert re.search(r"against \d+ in a step, in bf16, each up to 2 times the time of one in FP8\n", out)
    assert re.search(r"time +20.6% of all forward and backward passes at most", out)


def test_an_interval_that_adapts_begins_with_the_shortest(outcomes: dict[str, tuple[int, str, str]]) -> None:
    code, out, _ = outcomes[ADAPTIVE]
    assert code == 0
    assert "each refresh, every 1 to 30 steps and after each checkpoint" in out
    assert "at most 100 micro-batches for 2 references" in out  # packed: as many rows as samples at most
    (share,) = re.findall(r"time +([\d.]+)% of all", out)
    assert float(share) > 70


def test_what_the_optimizer_holds_elsewhere_is_not_counted(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """A precision-aware optimizer has two bytes of each parameter beside the bf16 one, and two moments in fp32."""
    plain, aware, away = (json.loads(outcomes[command][1]) for command in (AS_JSON[0], OFFLOADED, OFFLOADED_ALL))
    (elements,), (total,) = plain["shard_elements_per_rank"], plain["megatron_bytes_per_rank"]
    assert aware["megatron_bytes_per_rank"] == [total - 2 * elements]
    assert away["megatron_bytes_per_rank"] == [total - 12 * elements]


def test_a_checkpoint_that_is_to_be_resharded_takes_host_memory(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """12 bytes for each of 8.03e9 / 2 elements of TP2, on each rank of the group that shards them, context ranks included."""
    for command in (RESHARDABLE, RESHARDABLE_CP):
        assert re.search(r"a checkpoint +48\.18 GB of host memory on each rank", outcomes[command][1]), outcomes[
            command
        ]
    assert "a checkpoint" not in outcomes[EIGHT_B][1]


def test_a_checkpoint_gathers_experts_over_a_group_of_their_own(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """A quarter of the experts lies on 2 ranks each, and half of each other matrix on 4."""
    plan = json.loads(outcomes[RESHARDABLE_EP][1])
    held = 0
    for kind in plan["kinds"]:
        parts = 4 if ".experts." in kind["name"] else 2 if " over 2" in kind["split"] else 1
        held += kind["elements"] // parts
    assert plan["checkpoint_host_bytes_per_rank"] == 12 * held


def test_json_has_the_same_figures(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """Published: Llama 3.1 8B has 8,030,261,248 parameters, and 291 tensors in its Hugging Face files."""
    plain, on_host, of_update = (json.loads(outcomes[command][1]) for command in (*AS_JSON, UPDATE))
    assert plain["elements"] == 8_030_261_248
    assert plain["blocks"] == 291
    assert sum(kind["elements"] for kind in plain["kinds"]) == plain["elements"]
    (elements,) = plain["shard_elements_per_rank"]
    assert elements == pytest.approx(plain["elements"] / 8, rel=1e-4)  # norms are copied, shards padded
    assert plain["accelerator_bytes_per_rank"] == 2 * 4 * elements
    assert on_host["accelerator_bytes_per_rank"] == 2 * 2 * 2**24 * 2
    assert on_host["host_bytes_per_rank"] == 2 * 2 * elements
    assert (plain["step"]["collectives"], of_update["step"]["collectives"]) == (0, 1)
    assert of_update["blocks"] == 1


def test_the_table_of_the_papers_runs_is_what_is_planned(outcomes: dict[str, tuple[int, str, str]]) -> None:
    """Of Qwen, both stages."""
    rows = {
        stage: f"| `qwen2.5-7b` | 1 × 8 | {stage} | {plan['references']} | {plan['basis_bytes_per_rank'] / 1e9:.2f} GB | "
        f"{plan['step']['memory_traffic_bytes'] / 1e9:.2f} GB | {plan['refresh']['share_of_passes'] * 100:.1f} % |"
        for stage, plan in json.loads(outcomes[PAPER][1]).items()
    }
    assert [*rows] == ["sft", "dpo"]
    assert all(row in PAGE.read_text(encoding="utf-8").splitlines() for row in rows.values()), rows
