"""What ranks tell each other: a store of the job's, where each rank keeps one record, and where the run's end is announced.

One small write and one look for an end every few seconds and rank. Records are read only when somebody hangs.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore

from megatron_ogpsa.system.processes import attempt_in_store
from megatron_ogpsa.watchdog.story import Record

STORE_VARIABLE = "MEGATRON_OGPSA_STORE"
"""``host:port`` of a store that outlives the ranks, where another one than that of MASTER_ADDR and MASTER_PORT does."""

CONNECT_SECONDS = 30.0


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Why the run ends, as the first rank has announced it that had a reason.

    Attributes:
        host: the node on which it has been told already.
        rank: that has announced it.
        exit_code: of all ranks.
        is_failure: that rank has raised, and ends by itself.
    """

    message: str
    host: str
    rank: int
    exit_code: int
    is_failure: bool

    @classmethod
    def from_json(cls, text: bytes) -> Ending:
        """What the board holds."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Address:
    """Attributes:
    holder: whose end or hang makes the store silent, in words.
    is_own: this rank's process holds the store.
    """

    host: str
    port: int
    holder: str
    is_own: bool = False

    @classmethod
    def from_environment(cls) -> Address:
        """Of this job: torchrun's agent holds a store, or else rank 0 does."""
        if given := os.environ.get(STORE_VARIABLE):
            host, _, port = given.rpartition(":")
            return cls(host, int(port), "the launcher")
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return cls(*place, "the launcher")
        return cls(*place, "rank 0", is_own=os.environ.get("RANK") == "0")


def run_prefix() -> str:
    """Keys of this run: the store may be that of several attempts, and of several stages one after the other."""
    return f"megatron-ogpsa-watch/{attempt_in_store()}/{os.environ['MASTER_PORT']}"


class Board:
    """A connection of its own to the job's store. Calls block: for ever if the store's holder is frozen."""

    def __init__(self, address: Address, num_ranks: int) -> None:
        """Raises ``torch.distributed.DistError`` if the store cannot be reached."""
        client = TCPStore(
            address.host,
            address.port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
        self._store = PrefixStore(run_prefix(), client)
        self._num_ranks = num_ranks

    def exchange(self, record: Record) -> Ending | None:
        """Tell where this rank is; returns the end of the run if one is announced."""
        self._store.set(f"rank/{record.rank}", record.to_json())
        if not self._store.check(["ending"]):
            return None
        ending = Ending.from_json(self._store.get("ending"))
        self.count("informed")
        return ending

    def records(self) -> dict[int, Record]:
        """What all ranks have told last."""
        keys = [f"rank/{rank}" for rank in range(self._num_ranks)]
        if not self._store.check(keys):  # rare: a rank that has told nothing yet
            keys = [key for key in keys if self._store.check([key])]
        return {record.rank: record for record in map(Record.from_json, self._store.multi_get(keys))}

    def announce(self, ending: Ending) -> Ending:
        """End the run; returns the ending that holds, which is another one if some rank was faster."""
        own = json.dumps(asdict(ending))
        return Ending.from_json(self._store.compare_set("ending", "", own))

    def count(self, key: str) -> int:
        """How many calls there were with ``key`` on all ranks, with this one."""
        return int(self._store.add(f"count/{key}", 1))

    def counted(self, key: str) -> int:
        """How many calls of :meth:`count` there were."""
        return int(self._store.add(f"count/{key}", 0))
