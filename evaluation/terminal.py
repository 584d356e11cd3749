"""How a report is shown in a terminal of 100 columns: before, after and verdict, a few answers, what to try next.

Colour repeats what words say, on a terminal alone, and never where NO_COLOR is set (no-color.org).
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import textwrap

from evaluation.checks import NO, TOO_FEW, YES
from evaluation.page import tables
from evaluation.page.cards import deciders, held
from evaluation.page.numbers import NO_FIGURE, percent
from evaluation.page.pairs import label_of, models_of, shown_groups
from evaluation.page.rows import group_row, remark_on
from evaluation.page.wording import bound_text, figure_text, sentence
from evaluation.verdict import NOT_TRIED, SHOWN

WIDTH = 100  # columns
ANSWER_CHARACTERS = 240
COLOURS = {YES: "32", NO: "31", TOO_FEW: "33"}  # green, red, yellow
SHORT = {TOO_FEW: "too few rows", SHOWN: "not judged"}  # in the table; the sentence below it has all words
SIDES = {"forgotten": "forget", "kept": "keep"}  # part of the verdict -> the side that it judges


def print_report(report: dict, lines: list[dict], examples: int) -> None:
    """Print the verdict in a table and in sentences, the tables that fit, and answers of the models side by side."""
    print("\n".join(summary_lines(report)) + "\n")
    print_verdict(report)
    wide = []
    for table in terminal_tables(report):
        if table_width(table.rows) > WIDTH:
            wide.append(table.title)
            continue
        print(f"\n{table.title}", end="")
        print_table(table.rows)
    if wide:
        print("\n" + textwrap.fill(f"on the page, too wide for here: {'; '.join(wide)}", WIDTH))
    names = {group["name"] for group in shown_groups(report)}
    for line in example_lines([line for line in lines if line["group"] in names], examples):
        print("\n" + "\n".join(answer_lines(line, [model for model in models_of(report) if model in line])))
    print()


def coloured(text: str, answer: str) -> str:
    """Return a text in the colour of an answer of the verdict, if the output is a terminal that takes colours."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or answer not in COLOURS else f"\033[{COLOURS[answer]}m{text}\033[0m"


# ---------------------------------------------------------------------------------------------- the verdict
@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One line of the table: a part of the verdict with its answer, or below it a group or an attack."""

    name: str
    n: str
    cells: list[str]  # of each model: the share that is answered, with its interval
    answer: str = ""


def summary_lines(report: dict) -> list[str]:
    """Return the table of the verdict: its parts, each with the groups or attacks that it is about."""
    models = models_of(report)
    head = SummaryRow("answered (95 % interval)", "n", models, "verdict")
    rows = [head]
    for part in report["verdict"]["parts"]:
        rows += _attack_rows(report, part, models) if part["name"] == "resists" else _side_rows(report, part, models)
    widths = [max(len(row.cells[i]) for row in rows) for i in range(len(models))]
    n, verdict = max(len(row.n) for row in rows), max(len(_short(row.answer)) for row in rows)
    room = WIDTH - sum(widths) - n - verdict - 2 * (len(models) + 2)
    name = min(max(len(row.name) for row in rows), room)
    shown = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True)]
        label = row.name if len(row.name) <= name else row.name[: name - 3] + "..."
        start = "  ".join([label.ljust(name), row.n.rjust(n), *cells])
        shown.append(f"{start}  {coloured(_short(row.answer), row.answer)}".rstrip())
    return [shown[0], "-" * min(WIDTH, name + n + sum(widths) + verdict + 2 * (len(models) + 2)), *shown[1:]]


def _short(answer: str) -> str:
    return SHORT.get(answer, answer)


def _side_rows(report: dict, part: dict, models: list[str]) -> list[SummaryRow]:
    """Return the row of a side's groups together, and a row a group."""
    side = SIDES.get(part["name"])
    pooled = (report.get("pooled") or {}).get(side)
    total = _figures(pooled, models) if pooled else ("", [""] * len(models))
    rows = [SummaryRow(part["name"], *total, part["answer"])]
    groups = [group for group in shown_groups(report) if group["side"] == side]
    for group in sorted(groups, key=lambda group: not group["counts"]):
        n, cells = _figures(group, models)
        rows.append(SummaryRow(f"  {group['name']}", n, cells, "" if not remark_on(group) else "not judged"))
    return rows


def _figures(entry: dict, models: list[str]) -> tuple[str, list[str]]:
    row = group_row(entry, models, "")
    return str(row.n), [dot.text for dot in row.dots]


def _attack_rows(report: dict, part: dict, models: list[str]) -> list[SummaryRow]:
    """Return the row of all attacks, and the worst variant of each. An attack's control stands in the column of the
    model that it was made on."""
    name = f"{part['name']}: brought back" if report.get("attacks") else part["name"]
    rows = [SummaryRow(name, "", [""] * len(models), part["answer"])]
    for attack in tables.worst_variants(report):
        shares = {"after": percent(attack["back"])}
        if attack.get("control"):
            shares["before" if attack["control_name"] == "the original" else "retrained"] = percent(attack["control"])
        cells = [shares.get(model, NO_FIGURE) for model in models]
        rows.append(SummaryRow(f"  {attack['name']} ({attack['variant']})", str(attack["back"]["n"]), cells,
                               "" if attack["judged"] else "not judged"))  # fmt: skip
    return rows


def print_verdict(report: dict) -> None:
    """Print every part of the verdict with its sentence, then the requirements and what else must be said."""
    verdict = report["verdict"]
    width = max((len(part["name"]) for part in verdict["parts"]), default=0)
    for part in verdict["parts"]:
        said = part.get("said") or part["answer"]
        text = textwrap.fill(f"{part['name'].ljust(width)}  {said}: {sentence(part['why'])}", WIDTH,
                             subsequent_indent=" " * (width + 2))  # fmt: skip
        print(text.replace(part["answer"], coloured(part["answer"], part["answer"]), 1))
    for check in verdict["requirements"]:
        value = figure_text(check["figure"], check["value"], check["low"], check["high"])
        said = held(check["holds"])
        text = textwrap.fill(f"required  {check['figure']} {bound_text(check)}: {value}, {said}", WIDTH,
                             subsequent_indent=" " * 10)  # fmt: skip
        print(text.removesuffix(said) + coloured(said, check["holds"]) if text.endswith(said) else text)
    for note in verdict["notes"]:
        print(textwrap.fill(f"note: {note}", WIDTH, subsequent_indent="  "))
    for judge in deciders(report):
        print(textwrap.fill(f"judge: {judge.name}. {judge.limits}", WIDTH, subsequent_indent="  "))


# --------------------------------------------------------------------------------------------------- tables
def terminal_tables(report: dict) -> list[tables.Table]:
    """Return what was measured beside answers and attacks. The paper's columns: if a judge model was named."""
    made = (tables.memorisation_table, tables.given_text_table, tables.lm_eval_table, tables.membership_table,
            tables.forget_quality_table)  # fmt: skip
    found = [make(report) for make in made]
    if any(group["paper"]["after"].get("harmful") for group in report["groups"] if group.get("paper")):
        found.append(tables.paper_table(report))
    return [table for table in found if table.rows]


def _widths(rows: list[dict]) -> dict[str, int]:
    return {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}


def table_width(rows: list[dict]) -> int:
    """Return the columns of a terminal that a table takes."""
    widths = _widths(rows)
    return sum(widths.values()) + 2 * (len(widths) - 1)


def print_table(rows: list[dict]) -> None:
    """Print rows that have the same columns; every cell is text."""
    width = _widths(rows)
    print()
    for row in ({c: c for c in width}, {c: "-" * width[c] for c in width}, *rows):
        print("  ".join(row[c].ljust(width[c]) for c in width).rstrip())


# -------------------------------------------------------------------------------------------------- answers
def example_lines(lines: list[dict], count: int) -> list[dict]:
    """Return `count` lines, a forget and a keep row in turn, from as many groups as possible: the first of each, then
    the second of each. Groups that count come first."""
    by_group: dict[str, list[dict]] = {}
    for line in sorted(lines, key=lambda line: not line["counts"]):
        by_group.setdefault(line["group"], []).append(line)
    sides = [[group for group in by_group.values() if group[0]["side"] == side] for side in ("forget", "keep")]
    groups = [group for pair in itertools.zip_longest(*sides) for group in pair if group]
    deepest = max(map(len, groups), default=0)
    return [group[i] for i in range(deepest) for group in groups if i < len(group)][:count]


def printable(text: str) -> str:
    """Return a text in one line, without what a terminal would obey: a model's answer may hold escape sequences."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def answer_lines(line: dict, models: list[str]) -> list[str]:
    """Return a prompt, and below it what each model answers, in columns side by side."""
    width = (WIDTH - 2 - 3 * (len(models) - 1)) // len(models)
    columns = []
    for model in models:
        text = textwrap.shorten(printable(line[model]["answer"]), ANSWER_CHARACTERS, placeholder=" ...")
        head = textwrap.shorten(f"{model} ({label_of(line[model])}):", width, placeholder="...")
        columns.append([head, *textwrap.wrap(text or "(empty)", width)])
    prompt = textwrap.fill(f"[{line['group']}] {printable(line['prompt'])}", WIDTH, subsequent_indent="  ")
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [prompt, *("  " + " | ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)]


# ------------------------------------------------------------------------------------------------- what next
def next_steps(report: dict) -> list[str]:
    """Return what to try next, a line each: what a failed or open part of the verdict asks for."""
    answers = {part["name"]: part["answer"] for part in report["verdict"]["parts"]}
    steps = []
    if answers.get("forgotten") == NO:
        steps.append("forget more: raise --max_unlearn_steps or --bad_weight, or take another recipe "
                     "(recipes/README.md)")  # fmt: skip
    if answers.get("kept") == NO:
        steps.append(f"keep more: list normal rows of the kind that suffers{_worst_kept(report)}, add "
                     "--make_neighbours 48, or raise --normal_weight")  # fmt: skip
    if TOO_FEW in (answers.get("forgotten"), answers.get("kept")):
        asked, most = report["options"].get("prompts_per_group") or 0, max(group["n"] for group in report["groups"])
        steps.append(f"ask more prompts: raise --prompts_per_group (now {asked})" if most >= asked else
                     "ask more prompts: bring more rows; those of --unseen_data are never trained on")  # fmt: skip
    if answers.get("resists") == NOT_TRIED and answers.get("forgotten") in (YES, TOO_FEW):
        steps.append("try to get the answers back: the same command with --attacks all --quick")
    if answers.get("resists") == NO:
        steps.append("compare recipes under the attack that brings most back: sweep.py --attacks "
                     f"{tables.worst_variants(report)[0]['name']}")  # fmt: skip
    if answers.get("resists") == SHOWN:
        steps.append("have relearning judged: --retrained_name, a model that never knew the rows (finetune.py "
                     "makes one)")  # fmt: skip
    if set(answers.values()) == {YES}:
        steps.append("ask prompts of your own: the same command with --forget_data FILE --split all")
    return steps


def _worst_kept(report: dict) -> str:
    """Return the keep group that lost most of its answers, in brackets."""
    kept = [group for group in report["groups"] if group["side"] == "keep" and group["counts"]]
    lost = [(group["pair"]["retained"]["value"], group["name"]) for group in kept
            if (group["pair"].get("retained") or {}).get("value") is not None]  # fmt: skip
    return f" ({min(lost)[1]})" if lost else ""
