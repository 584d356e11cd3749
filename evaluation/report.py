"""Write a report as the page, as the model card and into the terminal. Nothing is measured or judged here.

Model output is hostile text: the page is rendered with autoescape on, holds no script and loads nothing from any
address.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import jinja2

from evaluation.page import tables
from evaluation.page.cards import held, shown_checks, verdict_cards
from evaluation.page.model_card import write_model_card
from evaluation.page.numbers import NO_FIGURE
from evaluation.page.pairs import clamp, example_pairs, label_of, models_of, shown_groups
from evaluation.page.rows import attack_bound, attack_families, control_rows, group_tables, learned_anyway
from evaluation.page.wording import bound_text, figure_text
from evaluation.plots import curves_plot, front_plot, layers_plot, relearn_plot
from evaluation.train_log import TrainLog
from utils import atomic_write_text

__all__ = ["front_plot", "print_report", "print_table", "write_model_card", "write_report"]

LINE_WIDTH = 110  # characters of the terminal
EXAMPLE_CHARACTERS = 240
NUMBER = re.compile(r"(x )?[-+]?[\d.,]+( |$|e)|not judged")


def _is_number(cell: str) -> bool:
    """Return whether a cell of a table is aligned as a number."""
    return cell == NO_FIGURE or bool(NUMBER.match(cell))


_pages = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"], default=False),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_pages.tests["number"] = _is_number
_pages.filters |= {"clamp": clamp, "label": label_of}


# ----------------------------------------------------------------------------------------------- the page
def write_report(path: Path, report: dict, lines: list[dict], train_log: TrainLog) -> None:
    """Write the page of an evaluation; with a training log, it shows the curves of the run."""
    groups = {group["name"]: group for group in shown_groups(report)}
    shown = [line for line in lines if line["group"] in groups]
    page = _pages.get_template("report.html").render(
        report=report,
        models=models_of(report),
        cards=verdict_cards(report),
        requirements=shown_checks(report["verdict"]["requirements"]),
        judges=[judge for judge in report["judges"] if judge["decides"]],
        pairs=example_pairs(report, lines),
        group_tables=group_tables(report),
        families=attack_families(report),
        controls=control_rows(report),
        attack_bound=attack_bound(report),
        is_bound_shifted=any(learned_anyway(attack) for attack in report.get("attacks") or ()),
        detail_tables=tables.detail_tables(report),
        figure_tables=tables.figure_tables(report),
        plots=detail_plots(report, train_log),
        groups=groups,
        lines=shown,
        labels=list(dict.fromkeys(label_of(line["after"]) for line in shown)),
        options=json.dumps(report["options"], indent=2, ensure_ascii=False),
        manifest=manifest_text(report["after"]),
    )
    atomic_write_text(path, page)


def detail_plots(report: dict, train_log: TrainLog) -> list[tuple[str, str, str]]:
    """Return (title, SVG text, how to read it) of every plot that there is something for."""
    plots = []
    if relearned := relearn_plot(report):
        plots.append(("Taught back, step by step", relearned, "Share of the forgotten prompts that is back after so "
                      "many steps of fine-tuning, with its 95 % interval."))  # fmt: skip
    if report.get("layers"):
        plots.append(("Layer by layer", layers_plot(report["layers"]), "Logit lens: mean NLL of the original's own "
                      "answers to the forgotten prompts, read after every layer with the final norm and head. Where "
                      "both curves lie together, the answers are still inside."))  # fmt: skip
    if train_log.steps:
        plots.append(("The run", curves_plot(train_log), "What the run minimised, over its steps."))
    return plots


def manifest_text(folder: str) -> str | None:
    """Return the text of the model's run_manifest.json, None if it has none."""
    file = Path(folder) / "run_manifest.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


# ------------------------------------------------------------------------------------------- the terminal
def print_report(report: dict, lines: list[dict], examples: int) -> None:
    """Print the verdict, the tables that it rests on, and a few answers of the models side by side."""
    print_verdict(report)
    for table in terminal_tables(report):
        print_table(table.rows)
    print()
    names = {group["name"] for group in shown_groups(report)}
    for line in example_lines([line for line in lines if line["group"] in names], examples):
        print(f"[{line['group']}] {' '.join(line['prompt'].split())}")
        for model in (model for model in models_of(report) if model in line):
            text = textwrap.shorten(" ".join(line[model]["answer"].split()), EXAMPLE_CHARACTERS) or "(empty)"
            said = f"{model} ({label_of(line[model])}): {text}"
            print(textwrap.indent(textwrap.fill(said, LINE_WIDTH), "    "))
        print()


def print_verdict(report: dict) -> None:
    """Print every part of the verdict with its sentence, then the requirements and what else must be said."""
    verdict = report["verdict"]
    width = max((len(part["name"]) for part in verdict["parts"]), default=0)
    for part in verdict["parts"]:
        start = f"{part['name'].ljust(width)}  {part['answer']}: "
        print(textwrap.fill(start + part["why"], LINE_WIDTH, subsequent_indent=" " * (width + 2)))
    for check in verdict["requirements"]:
        value = figure_text(check["figure"], check["value"], check["low"], check["high"])
        print(f"required  {check['figure']} {bound_text(check)}: {value}, {held(check['holds'])}")
    for note in verdict["notes"]:
        print(textwrap.fill(f"note: {note}", LINE_WIDTH, subsequent_indent="  "))
    for judge in (judge for judge in report["judges"] if judge["decides"]):
        print(textwrap.fill(f"judge: {judge['name']}. {judge['limits']}", LINE_WIDTH, subsequent_indent="  "))


def terminal_tables(report: dict) -> list[tables.Table]:
    """Return the tables that are printed, of those that have a row. The paper's columns: if a judge model was named."""
    made = (tables.group_table, tables.memorisation_table, tables.given_text_table, tables.lm_eval_table,
            tables.membership_table, tables.forget_quality_table)  # fmt: skip
    found = [make(report) for make in made]
    if any(group["paper"]["after"].get("harmful") for group in report["groups"] if group.get("paper")):
        found.append(tables.paper_table(report))
    found.append(tables.attack_table(report))
    return [table for table in found if table.rows]


def print_table(rows: list[dict]) -> None:
    """Print rows that have the same columns; every cell is text."""
    width = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    print()
    for row in ({c: c for c in width}, {c: "-" * width[c] for c in width}, *rows):
        print("  ".join(row[c].ljust(width[c]) for c in width).rstrip())


def example_lines(lines: list[dict], count: int) -> list[dict]:
    """Return `count` lines from as many groups as possible: the first of each, then the second of each."""
    by_group: dict[str, list[dict]] = {}
    for line in lines:
        by_group.setdefault(line["group"], []).append(line)
    deepest = max(map(len, by_group.values()), default=0)
    return [group[i] for i in range(deepest) for group in by_group.values() if i < len(group)][:count]
