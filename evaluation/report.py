"""Write a report as the page and as the model card. Nothing is measured or judged here.

Model output is hostile text: the page is rendered with autoescape on, holds no script and loads nothing from any
address.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2

from evaluation.page import tables
from evaluation.page.cards import deciders, lead_of, shown_checks, verdict_cards
from evaluation.page.model_card import write_model_card
from evaluation.page.numbers import NO_FIGURE
from evaluation.page.pairs import clamp, example_pairs, label_of, models_of, shown_groups
from evaluation.page.rows import attack_bound, attack_families, control_rows, group_tables, learned_anyway
from evaluation.plots import curves_plot, front_plot, layers_plot, relearn_plot
from evaluation.train_log import TrainLog
from utils import atomic_write_text

__all__ = ["front_plot", "write_model_card", "write_report"]

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
        lead=lead_of(report["verdict"]),
        requirements=shown_checks(report["verdict"]["requirements"]),
        judges=deciders(report),
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
