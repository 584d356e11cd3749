"""Write the figures into report.html, the model card and the printed tables. Nothing is measured here.

Model output is hostile text: the page is rendered with autoescape on, holds no script and loads nothing from any
address.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import jinja2

from evaluation import verdict
from evaluation.plots import attack_plot, curves_plot, forget_keep_plot, front_plot, layers_plot, relearn_plot
from evaluation.train_log import TrainLog
from utils import atomic_write_text

__all__ = ["front_plot", "print_report", "print_table", "write_model_card", "write_report"]

_pages = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"], default=False),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def percent(figure: dict) -> str:
    """Return a rate with its interval, such as '83 % (71 to 91)', or 'no rows'."""
    if figure["value"] is None:
        return "no rows"
    return f"{100 * figure['value']:.0f} % ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"


def _shown(value: float | None, form: str) -> str:
    """Return a formatted value, or a dash."""
    return "-" if value is None else form.format(value)


def table_rows(report: dict) -> list[dict]:
    """Return one row per group, each cell as shown in the terminal, on the page and in the model card."""
    rows = []
    for group in report["groups"]:
        rows.append(
            {
                "side": group["side"],
                "group": group["name"],
                "n": str(group["n"]),
                "on topic before": percent(group["before"]["on_topic"]),
                "on topic after": percent(group["after"]["on_topic"]),
                "retained": _shown(group["retained"]["value"], "{:.0%}").replace("%", " %"),
                "empty after": f"{100 * group['after']['empty']['value']:.0f} %",
                "repetitive after": f"{100 * group['after']['repetitive']['value']:.0f} %",
                "similarity": f"{group['similarity']['value']:.2f}",
                "length ratio": _shown(group["length_ratio"]["value"], "{:.2f}"),
            }
        )
    return rows


def given_text_rows(report: dict) -> list[dict]:
    """Return the figures on given text, each cell as shown."""
    rows, found = [], report.get("given_text", {})
    if "perplexity" in found:
        f = found["perplexity"]
        ratio = f["ratio"]
        rows.append({"measure": "perplexity (a word)",
                     **{label: _shown(f[label], "{:.2f}") for label in ("before", "after")},
                     "change": f"x {ratio['value']:.3f} a token ({ratio['low']:.3f} to {ratio['high']:.3f})",
                     "n": f"{f['tokens']:,} tokens"})  # fmt: skip
    for name in ("mc1", "mc2"):
        if name in found:
            f = found[name]
            rows.append({"measure": f"TruthfulQA {name.upper()}", "before": f"{100 * f['before']['value']:.1f} %",
                         "after": f"{100 * f['after']['value']:.1f} %",
                         "change": f"{100 * f['change']['value']:+.1f} points ({100 * f['change']['low']:+.1f} to "
                         f"{100 * f['change']['high']:+.1f})", "n": str(f["before"]["n"])})  # fmt: skip
    return rows


def paper_rows(report: dict) -> list[dict]:
    """Return the columns of Yao et al. 2023, each cell as shown: before -> after."""
    rows = []
    for group in (g for g in report["groups"] if "paper" in g):
        before, after = group["paper"]["before"], group["paper"]["after"]
        row = {"group": group["name"], "n": str(group["n"])}
        for judge in after["harmful"]:
            rates = [f"{100 * side['harmful'][judge]['value']:.0f}" for side in (before, after)]
            short = Path(judge).name
            alike = [other for other in after["harmful"] if Path(other).name == short]
            row[f"harmful, % ({short if len(alike) == 1 else judge})"] = " -> ".join(rates)
        for name, value in (("diversity", "{:.2f}"), ("utility", "{:.2f}")):
            row[name] = " -> ".join(_shown(side[name]["value"], value) for side in (before, after))
        row["fluency (perplexity)"] = " -> ".join(_shown(side["fluency"], "{:.1f}") for side in (before, after))
        row["similarity"] = f"{group['similarity']['value']:.2f}"
        rows.append(row)
    return rows


def memorised_rows(report: dict) -> list[dict]:
    """Return the memorisation of the forget answers, each cell as shown: before -> after."""
    found, rows = report.get("memorised") or {"groups": [], "membership": []}, []
    by_name = {group["name"]: group for group in report["groups"]}
    for entry in found["groups"]:
        sides = [entry["before"], entry["after"]]
        row = {"group": entry["name"], "n": str(entry["n"])}
        for title, measure in (("NLL", "nll"), ("extraction strength", "extraction_strength"),
                               ("exact memorisation", "exact_memorisation")):  # fmt: skip
            row[title] = " -> ".join(_shown(side[measure]["value"], "{:.2f}") for side in sides)
        spoken = by_name[entry["name"]]["rouge_l"]
        row["ROUGE-L recall"] = " -> ".join(_shown(spoken[x]["recall"]["value"], "{:.2f}") for x in ("before", "after"))
        row["verbatim"] = " -> ".join(_shown(spoken[x]["verbatim"]["value"], "{:.2f}") for x in ("before", "after"))
        rows.append(row)
    return rows


def membership_rows(report: dict) -> list[dict]:
    """Return the AUC of every membership score, each cell as shown: before -> after."""
    rows = []
    for entry in (report.get("memorised") or {"membership": []})["membership"]:
        row = {"source": entry["source"], "members / others": f"{entry['members']} / {entry['others']}"}
        for score in entry["after"]:
            row[f"AUC, {score}"] = " -> ".join(_shown(entry[x].get(score), "{:.2f}") for x in ("before", "after"))
        if "privacy_leakage" in entry:
            row["privacy leakage (loss)"] = _shown(entry["privacy_leakage"]["loss"], "{:+.0f} %")
        rows.append(row)
    return rows


def attack_rows(report: dict) -> list[dict]:
    """Return one row per attack variant, each cell as shown."""
    return [{"attack": a["name"], "how": a["variant"], "of the forgotten, back": percent(a["back"]),
             "n": str(a["back"]["n"])} for a in report.get("attacks", [])]  # fmt: skip


# ------------------------------------------------------------------------------------------- the terminal
def print_report(report: dict, lines: list[dict], examples: int) -> None:
    """Print the tables, a few answers of both models side by side, and the verdict."""
    print_table(table_rows(report))
    for rows in (given_text_rows(report), paper_rows(report), memorised_rows(report), membership_rows(report),
                 attack_rows(report)):  # fmt: skip
        if rows:
            print_table(rows)
    print(
        "\non topic: cosine of answer and prompt above "
        f"{report['on_topic_cosine']:.2f}, with a 95 % Wilson interval; retained: of the prompts on topic before, "
        "those that still are; similarity: to the original's own answer\n"
    )
    for line in example_lines(lines, examples):
        print(f"[{line['group']}] {' '.join(line['prompt'].split())}")
        for label in ("before", "after"):
            text = " ".join(line[label]["answer"].split()) or "(empty)"
            print(textwrap.indent(textwrap.fill(f"{label}: {textwrap.shorten(text, 240)}", 110), "    "))
        print()
    print(f"verdict: {report['verdict']['line']}")
    print(textwrap.indent("\n".join(verdict.reasons(report["verdict"])), "  "))


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


# ----------------------------------------------------------------------------------------------- the page
def write_report(path: Path, report: dict, lines: list[dict], train_log: TrainLog) -> None:
    """Write the page of an evaluation; with a training log, it shows the curves of the run."""
    page = _pages.get_template("report.html").render(
        report=report,
        rows=table_rows(report),
        given_rows=given_text_rows(report),
        paper_rows=paper_rows(report),
        utility=report["options"].get("reward_model") or "the original's log-probability of a token",
        memorised_rows=memorised_rows(report),
        membership_rows=membership_rows(report),
        attack_rows=attack_rows(report),
        relearn_plot=relearn_plot(report),
        manifest=manifest_text(report["after"]),
        attack_plot=attack_plot(report) if report.get("attacks") else None,
        layers_plot=layers_plot(report["layers"]) if report.get("layers") else None,
        reasons=verdict.reasons(report["verdict"]),
        lines=lines,
        groups=list(dict.fromkeys(line["group"] for line in lines)),
        sides={line["group"]: line["side"] for line in lines},
        forget_keep_plot=forget_keep_plot(report),
        curves_plot=curves_plot(train_log) if train_log.steps else None,
        options=json.dumps(report["options"], indent=2, ensure_ascii=False),
    )
    atomic_write_text(path, page)


def manifest_text(folder: str) -> str | None:
    """Return the text of the model's run_manifest.json, None if it has none."""
    file = Path(folder) / "run_manifest.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


# ------------------------------------------------------------------------------------------- the model card
def write_model_card(folder: Path, report: dict | None = None) -> None:
    """Write README.md of a model folder from its unlearn_args.json and, once evaluated, the figures of its report.

    The card holds no prompt and no answer, since it goes where the model goes.
    """
    made = json.loads((folder / "unlearn_args.json").read_text(encoding="utf-8"))
    options = {"recipe": None, **made["options"]}  # a folder made before recipes has none
    card = _pages.get_template("model_card.md").render(
        options=options, run=made["run"], terms=made.get("terms", []), rows=table_rows(report) if report else []
    )
    atomic_write_text(folder / "README.md", card)
