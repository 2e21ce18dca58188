"""Scores of one checkpoint after another, kept as they come: what fails later takes nothing of them away."""

from __future__ import annotations

from types import TracebackType

import torch.distributed as dist

from megatron_ogpsa.evaluation import report
from megatron_ogpsa.evaluation.request import Request
from megatron_ogpsa.evaluation.scores import Scores
from megatron_ogpsa.integration.ranks.agreement import from_rank_0


class Results:
    """What was found so far, and the files of ``--answers`` and ``--json``, each of which is whole at any time.

    At the end of a with statement, however it comes, rank 0 shows the table of the checkpoints that were scored; if
    something was raised, it says what has become of the answers.
    """

    def __init__(self, request: Request) -> None:
        """Nothing is found or written yet."""
        self._answers_file = request.answers
        self._json_file = request.json
        self._begun: list[Scores] = []
        self._num_scored = 0
        self._num_written = 0

    def __enter__(self) -> Results:
        """See the class."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See the class."""
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        if error is not None and (told := self._fate_of_answers()):
            print(f"\n{told}", flush=True)
        if self._num_scored:
            print(f"\n{report.terminal_table(self._begun[: self._num_scored])}", flush=True)

    def require_places(self) -> None:
        """Look whether the files can be written, before there is something to lose. Collective.

        Raises:
            UserError: one of them cannot; on all ranks alike.
        """
        from_rank_0(self._require_places)

    def begin(self, scores: Scores) -> None:
        """Take in a further checkpoint, of which little is known yet."""
        self._begun.append(scores)

    def keep_answers(self) -> None:
        """Write the answers and verdicts that there are. Collective.

        Raises:
            UserError: the file cannot be written; on all ranks alike.
        """
        from_rank_0(self.write_answers)

    def write_answers(self) -> None:
        """As :meth:`keep_answers`, on one process."""
        if self._answers_file is not None:
            report.write_answers(self._answers_file, self._begun)
            self._num_written = self._num_answers

    def tell_answers(self, scores: Scores, name: str) -> None:
        """Say where the answers to one set lie: whatever ends the run, its log has told it."""
        if self._answers_file is not None and dist.get_rank() == 0:
            print(f"{scores.title}: the answers to {name} are in {self._answers_file}", flush=True)

    def finish(self) -> None:
        """Write the scores: all that is asked of the checkpoint that was begun last is known. Collective.

        Raises:
            UserError: a file cannot be written; on all ranks alike.
        """
        self._num_scored = len(self._begun)
        from_rank_0(self._write_scores)

    def _write_scores(self) -> None:
        if self._json_file is not None:
            report.write_scores(self._json_file, self._begun)

    def _require_places(self) -> None:
        for flag, path in (("--answers", self._answers_file), ("--json", self._json_file)):
            if path is not None:
                report.require_place(flag, path)

    @property
    def _num_answers(self) -> int:
        return sum(len(answered.answers) for scores in self._begun for answered in scores.answers.values())

    def _fate_of_answers(self) -> str:
        if self._num_written:
            return f"Before this failed, {self._num_written} answers were written: {self._answers_file}"
        if self._num_answers and self._answers_file is None:
            return f"{self._num_answers} answers are lost: --answers FILE would have kept them"
        return ""
