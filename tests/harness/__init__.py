"""Worker groups: processes that stay up and run the distributed tests of a whole session, one job after the other."""

from tests.harness.group import JobFailed, WorkerGroup

__all__ = ["JobFailed", "WorkerGroup"]
