"""``megatron-ogpsa`` that takes ``SECONDS`` for the first conversation or pair that a process tokenizes.

Each process says in a file ``tokenized`` that it has done so.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from megatron_ogpsa.cli import launching, main
from megatron_ogpsa.data.tokenizer import ChatTokenizer

encode_chat = ChatTokenizer.encode_chat
_slow: list[bool] = []


def slow_encode_chat(self: ChatTokenizer, *args: Any, **more: Any) -> tuple[list[int], list[bool]]:
    if not _slow:
        _slow.append(True)
        with Path("tokenized").open("a", encoding="utf-8") as file:
            file.write(f"rank {os.environ['RANK']}\n")
        time.sleep(float(os.environ["SECONDS"]))
    return encode_chat(self, *args, **more)


if "RANK" in os.environ:
    ChatTokenizer.encode_chat = slow_encode_chat  # type: ignore[method-assign]

if __name__ == "__main__":
    launching.RANK_MODULE = "tests.integration.slow_tokenizing"
    sys.exit(main.main())
