"""What the ranks of the tests of turns run; each function returns plain values."""

from __future__ import annotations

import os
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megatron_ogpsa.data import load_chat_tokenizer, sources
from megatron_ogpsa.errors import UserError
from megatron_ogpsa.integration.inputs import datasets
from megatron_ogpsa.integration.ranks import turns
from megatron_ogpsa.watchdog import progress
from megatron_ogpsa.watchdog.place import place_of, thread_stack


def waiting(failure: str | None = None) -> dict[str, Any]:
    """What a watch sees of a rank that waits, and what the ranks get in the end."""
    seen: list[tuple[str | None, str, int]] = []
    stop, watched = threading.Event(), threading.get_ident()

    def look() -> None:
        while not stop.wait(0.1):
            seen.append((place_of(thread_stack(watched)).collective, progress.phase, progress.pulses))

    def work() -> str:
        time.sleep(4.0)
        if failure == "user":
            raise UserError("data.jsonl:3: broken")
        if failure:
            raise KeyError("lost")
        return "found"

    watch = threading.Thread(target=look)
    watch.start()
    try:
        result = turns.told_by_rank_0(work, "a long work")
    except (UserError, RuntimeError) as error:
        result = f"{type(error).__name__}: {error}"
    stop.set()
    watch.join()
    dist.barrier()
    during = [look for look in seen if look[1] == "a long work"]
    return {
        "result": result,
        "collectives": sorted({str(collective) for collective, _, _ in during if collective is not None}),
        "pulses": during[-1][2] - during[0][2],
    }


def lost_worker() -> str:
    """Rank 0 never does its work."""
    if dist.get_rank() == 0:
        next(turns._numbers)
        time.sleep(4.0)
        return "away"
    try:
        with patch.object(turns, "SILENT_SECONDS", 1.0):
            turns.done_by([0], lambda: None, "a long work")
    except RuntimeError as error:
        return str(error)
    return "not noticed"


def load(tokenizer: str, source: str, folder: str, places: list[str], copies: list[str]) -> dict[str, Any]:
    """Rank 0 is a node, and the others are one: each sees what is built in its of ``places``, and its of ``copies``."""
    rank = dist.get_rank()
    args = Namespace(data_cache_path=str(Path(folder) / places[rank]), seq_length=64, ogpsa_packing=True)
    chat_tokenizer = load_chat_tokenizer("HuggingFaceTokenizer", tokenizer)
    datasets.load_conversations.cache_clear()
    os.chdir(Path(folder) / copies[rank])
    with (
        patch.dict(os.environ, {"LOCAL_RANK": str(max(rank - 1, 0))}),
        patch("megatron.training.get_args", lambda: args),
        patch("megatron.training.print_rank_0"),
        patch.object(datasets, "chat_tokenizer", lambda: chat_tokenizer),
        patch.object(sources, "_scan_json", side_effect=sources._scan_json) as scan,
    ):
        try:
            dataset = datasets.load_conversations(source)
        except UserError as error:
            return {"result": str(error)}
    supervised = sum(int(dataset[row]["loss_mask"].sum()) for row in range(len(dataset)))
    return {"result": dataset.fingerprint, "supervised": supervised, "hashed": scan.call_count}
