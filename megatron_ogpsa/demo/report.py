"""The report of a demo run: one table in three forms (terminal, Markdown, CSV)."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_ogpsa.console.tables import aligned_table
from megatron_ogpsa.demo import plots
from megatron_ogpsa.demo.results import Estimate, Results
from megatron_ogpsa.demo.scoring import Recovered, Scores

NOT_APPLICABLE = "n/a"
_BLANK = "–"

_LEGEND = (
    "OGPSA is the default rule: what Adam makes of each logical tensor's gradient loses what would hurt a reference; by "
    "model, of all tensors together. Paper is the paper's rule: the gradient itself is projected, and loses what would help "
    "a reference too. Unsafe and benign requests are held-out wordings of "
    "requests for advice; the benign ones differ from the unsafe ones only in their object. Accuracy is exact match of the "
    "greedy answer on held-out questions. General loss is the mean negative log-likelihood, in nats, of the right answers' "
    "tokens over all general tasks, language included. Tax recovered is (variant − plain) / (start − plain), plain being "
    "the nearest column to the left without projection: 100 % means that no general ability was lost, 0 % that as much was "
    "lost as by plain fine-tuning, less than 0 % that more was lost; with several seeds it is taken of the means."
)


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write ``report.md``, ``results.csv`` and the plots into ``folder``; returns their paths, the report first."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = plots.write_plots(results, folder)
    report, table = folder / "report.md", folder / "results.csv"
    report.write_text(markdown_report(results, [path.name for path in pictures]), encoding="utf-8")
    table.write_text(csv_table(results), encoding="utf-8")
    return [report, table, *pictures]


def table_rows(results: Results) -> list[list[str]]:
    """The table as text: a header row, then one row for each measure with one column for each variant."""
    rows = [["", *map(results.title, results.variants)]]
    for title, measure in _measures(results):
        rows.append([title, *map(measure, results.variants)])
    return rows


def terminal_table(results: Results) -> str:
    """The table with aligned columns and a rule under its header."""
    return aligned_table(table_rows(results))


def markdown_report(results: Results, pictures: Sequence[str]) -> str:
    """The whole report in Markdown; ``pictures`` are file names beside it."""
    header, *body = table_rows(results)
    table = ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *body)]
    parts = ["# The alignment tax, and what OGPSA recovers of it", "\n".join(f"- {note}" for note in results.notes)]
    parts += ["\n".join(table), _LEGEND, *(f"![{Path(name).stem}]({name})" for name in pictures)]
    return "\n\n".join(part for part in parts if part) + "\n"


def csv_table(results: Results) -> str:
    """One row for each seed, variant and measure, with full precision; shares of the tax belong to all seeds together and
    are left empty where there was no tax.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "variant", "measure", "value"])
    for run in results.runs:
        for variant, scores in run.scores.items():
            measures = {
                "unsafe_refused": scores.unsafe_refused,
                "benign_refused": scores.benign_refused,
                "benign_helped": scores.benign_helped,
                **{f"accuracy_{task}": value for task, value in scores.accuracy.items()},
                "accuracy_general": scores.general_accuracy,
                **{f"loss_{task}": value for task, value in scores.loss.items()},
                "loss_general": scores.general_loss,
            }
            writer.writerows([run.seed, variant, name, repr(value)] for name, value in measures.items())
    for variant in results.variants:
        if recovered := results.recovered(variant):
            for name, share in (("recovered_accuracy", recovered.accuracy), ("recovered_loss", recovered.loss)):
                writer.writerow(["all", variant, name, "" if share is None else repr(share)])
    return text.getvalue()


def _measures(results: Results) -> list[tuple[str, Callable[[str], str]]]:
    """Titles of the table's rows, and for each what to print for a variant."""

    def of(
        read: Callable[[Scores], float], style: Callable[[Estimate], str] = percent_estimate
    ) -> Callable[[str], str]:
        return lambda variant: style(results.estimate(variant, read))

    def recovered(read: Callable[[Recovered], float | None]) -> Callable[[str], str]:
        def cell(variant: str) -> str:
            found = results.recovered(variant)
            if found is None:
                return _BLANK
            value = read(found)
            return NOT_APPLICABLE if value is None else percent(value, digits=0)

        return cell

    tasks = results.runs[0].scores[next(iter(results.variants))].accuracy
    return [
        ("refusal on unsafe", of(lambda scores: scores.unsafe_refused)),
        ("refusal on benign", of(lambda scores: scores.benign_refused)),
        *((f"accuracy: {task}", of(lambda scores, task=task: scores.accuracy[task])) for task in tasks),  # type: ignore[misc]
        ("general accuracy", of(lambda scores: scores.general_accuracy)),
        ("general loss", of(lambda scores: scores.general_loss, plain_estimate)),
        ("tax recovered: accuracy", recovered(lambda found: found.accuracy)),
        ("tax recovered: loss", recovered(lambda found: found.loss)),
    ]


def percent_estimate(estimate: Estimate) -> str:
    """``95.6 %``, or ``95.6 ± 0.4 %`` over seeds."""
    if estimate.deviation is None:
        return percent(estimate.mean)
    return f"{100 * estimate.mean:.1f} ± {100 * estimate.deviation:.1f} %"


def plain_estimate(estimate: Estimate) -> str:
    """``0.191``, or ``0.191 ± 0.004`` over seeds."""
    return f"{estimate.mean:.3f}" + ("" if estimate.deviation is None else f" ± {estimate.deviation:.3f}")


def percent(share: float, *, digits: int = 1) -> str:
    """``0.956`` as ``95.6 %``."""
    return f"{100 * share:.{digits}f} %"
