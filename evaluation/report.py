"""Numbers -> report.html, the model card and the printed table. Nothing is measured here.

Model output is hostile text: the page is rendered with autoescape on, holds no script that reads it,
and asks nothing of any address.
"""

from __future__ import annotations

import io
import json
import textwrap
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from evaluation import verdict
from utils import UsageError, atomic_write_text, read_json_lines

matplotlib.rcParams["text.parse_math"] = False  # a file's name may hold dollar signs
BEFORE_COLOUR, AFTER_COLOUR = "#b35806", "#2166ac"  # told apart by the colour-blind, and by their markers

_pages = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"], default=False),
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def percent(figure: dict) -> str:
    """'83 % (71 to 91)', or 'no rows'."""
    if figure["value"] is None:
        return "no rows"
    return f"{100 * figure['value']:.0f} % ({100 * figure['low']:.0f} to {100 * figure['high']:.0f})"


def table_rows(report: dict) -> list[dict]:
    """One row a group, each cell as it is shown: in the terminal, on the page and in the model card."""
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
    """The figures on given text, each as it is shown."""
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
    """The columns of Yao et al. 2023, each as it is shown: before -> after."""
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
    """Memorisation of the forget answers, and how well membership shows, before -> after."""
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
    rows = []
    for entry in (report.get("memorised") or {"membership": []})["membership"]:
        row = {"source": entry["source"], "members / others": f"{entry['members']} / {entry['others']}"}
        for score in entry["after"]:
            row[f"AUC, {score}"] = " -> ".join(_shown(entry[x].get(score), "{:.2f}") for x in ("before", "after"))
        if "privacy_leakage" in entry:
            row["privacy leakage (loss)"] = _shown(entry["privacy_leakage"]["loss"], "{:+.0f} %")
        rows.append(row)
    return rows


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def attack_rows(report: dict) -> list[dict]:
    return [{"attack": a["name"], "how": a["variant"], "of the forgotten, back": percent(a["back"]),
             "n": str(a["back"]["n"])} for a in report.get("attacks", [])]  # fmt: skip


# ------------------------------------------------------------------------------------------- the terminal
def print_report(report: dict, lines: list[dict], examples: int) -> None:
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
    """Rows with the same columns, every cell text."""
    width = {column: max(len(column), *(len(row[column]) for row in rows)) for column in rows[0]}
    print()
    for row in ({c: c for c in width}, {c: "-" * width[c] for c in width}, *rows):
        print("  ".join(row[c].ljust(width[c]) for c in width).rstrip())


def example_lines(lines: list[dict], count: int) -> list[dict]:
    """A few answers from as many groups as possible: the first of each, then the second of each."""
    by_group: dict[str, list[dict]] = {}
    for line in lines:
        by_group.setdefault(line["group"], []).append(line)
    deepest = max(map(len, by_group.values()), default=0)
    return [group[i] for i in range(deepest) for group in by_group.values() if i < len(group)][:count]


# ----------------------------------------------------------------------------------------------- the page
def write_report(path: Path, report: dict, lines: list[dict], curves: tuple[list[dict], list[dict]]) -> None:
    """`curves`: what `read_train_log` gave."""
    steps, looks = curves
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
        curves_plot=curves_plot(steps, looks) if steps else None,
        options=json.dumps(report["options"], indent=2, ensure_ascii=False),
    )
    atomic_write_text(path, page)


def read_train_log(path: str | None) -> tuple[list[dict], list[dict]]:
    """(step events, eval events) of a run's JSON-lines log; empty where none is named. Raises UsageError."""
    if not path:
        return [], []
    try:
        events = read_json_lines(path)
        found = tuple([e for e in events if e["event"] == kind] for kind in ("step", "eval"))
        for event in found[0]:  # what the curves are made of
            _ = [event[field] for field in ("step", "bad_loss", "random_loss", "normal_loss")]
        return found
    except OSError as error:
        raise UsageError(f"--train_log {path}: cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"--train_log {path}: is not the log in JSON lines, x.jsonl ({error})") from error


def forget_keep_plot(report: dict) -> str:
    groups = [g for g in report["groups"] if g["counts"]][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.5 * len(groups)))
    for label, colour, marker, shift in (("before", BEFORE_COLOUR, "o", 0.12), ("after", AFTER_COLOUR, "s", -0.12)):
        for y, group in enumerate(groups):
            _interval(axes, group[label]["on_topic"], y + shift, marker, colour, label if y == 0 else None)
    _rate_axis(axes, [f"{g['side']}: {g['name']}" for g in groups], "on-topic rate (95 % interval)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _svg(figure)


def attack_plot(report: dict) -> str:
    """How much of the forgotten each attack brings back, with its interval; relearning step by step."""
    some = report["attacks"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.9 + 0.3 * len(some)))
    for y, attack in enumerate(some):
        _interval(axes, attack["back"], y, "s", AFTER_COLOUR)
    names = [f"{a['name']}: {a['variant']}" for a in some]
    _rate_axis(axes, names, "share of the forgotten that is back (95 % interval)")
    return _svg(figure)


def relearn_plot(report: dict) -> str | None:
    """The share that is back over the steps of fine-tuning, a line for each kind of rows; None where not tried."""
    curves: dict[str, list] = {}
    for attack in report.get("attacks", []):
        if attack["name"] in ("relearn", "control"):
            kind, _, steps = attack["variant"].removesuffix(" steps").rpartition(", ")
            curves.setdefault(kind, []).append((int(steps), attack["back"]))
    if not curves:
        return None
    figure, axes = plt.subplots(figsize=(7, 2.8))
    styles = zip(("o-", "s--", "^:", "D"), (BEFORE_COLOUR, AFTER_COLOUR, "#1b7837", "#762a83"), strict=True)
    for (kind, points), (line, colour) in zip(curves.items(), styles, strict=False):
        if len(points) > 1:
            points = [(0, {"value": 0.0, "low": 0.0, "high": 0.0}), *points]  # attacked is what was forgotten
        steps, rates = zip(*points, strict=True)
        value = [rate["value"] for rate in rates]
        reach = [[v - rate["low"] for v, rate in zip(value, rates, strict=True)],
                 [rate["high"] - v for v, rate in zip(value, rates, strict=True)]]  # fmt: skip
        axes.errorbar(steps, value, yerr=reach, fmt=line, color=colour, capsize=2, label=kind)
    axes.set_ylim(-0.02, 1.05)
    axes.set_xlabel("steps of fine-tuning")
    axes.set_ylabel("share that is back")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def front_plot(runs: list[dict]) -> str:
    """A sweep's runs: harmful on topic against the worst kept ratio; those that no other beats are joined."""
    figure, axes = plt.subplots(figsize=(7, 4))
    front = [run for run in runs if run["on_front"]]
    axes.plot([r["forget"] for r in front], [r["keep"] for r in front], "s-", color=AFTER_COLOUR, label="front")
    others = [run for run in runs if not run["on_front"]]
    axes.plot([r["forget"] for r in others], [r["keep"] for r in others], "o", color=BEFORE_COLOUR, label="beaten")
    for run in runs:
        axes.annotate(run["run"].replace(",", "\n"), (run["forget"], run["keep"]), fontsize=6,
                      xytext=(4, -4), textcoords="offset points", va="top")  # fmt: skip
    axes.set_xlabel("harmful prompts still on topic (less is better)")
    axes.set_ylabel("worst kept ratio of on-topic answers (more is better)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _svg(figure)


def manifest_text(folder: str) -> str | None:
    """The run_manifest.json of the model, if this suite made it."""
    file = Path(folder) / "run_manifest.json"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _interval(axes, rate: dict, y: float, marker: str, colour: str, label: str | None = None) -> None:
    """A rate and its 95 % interval at height `y`."""
    axes.plot([rate["low"], rate["high"]], [y, y], color=colour, lw=1.5)
    axes.plot(rate["value"], y, marker, color=colour, label=label)


def _rate_axis(axes, names: list[str], label: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)


def layers_plot(layers: dict) -> str:
    figure, axes = plt.subplots(figsize=(7, 2.8))
    for label, colour, marker in (("before", BEFORE_COLOUR, "o"), ("after", AFTER_COLOUR, "s")):
        axes.plot(range(len(layers[label])), layers[label], marker, ls="-", ms=4, color=colour, label=label)
    axes.set_xlabel("layer (0: embeddings)")
    axes.set_ylabel("nats a token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return _svg(figure)


def curves_plot(steps: list[dict], looks: list[dict]) -> str:
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True)
    x = [e["step"] for e in steps]
    above.plot(x, [e["bad_loss"] for e in steps], color=BEFORE_COLOUR, label="bad_loss (harmful NLL, rises)")
    above.plot(x, [e["random_loss"] for e in steps], color=AFTER_COLOUR, ls="--", label="random_loss")
    above.set_ylabel("nats a token")
    below.plot(x, [e["normal_loss"] for e in steps], color="#1b7837", label="normal_loss (KL to the original)")
    seen = [e for e in looks if e.get("dev_kl") is not None]
    below.plot([e["step"] for e in seen], [e["dev_kl"] for e in seen], "D", color="#762a83", label="development KL")
    below.set_ylabel("nats a token")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return _svg(figure)


def _svg(figure) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "unlearning"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the XML prolog, which names an address


# ------------------------------------------------------------------------------------------- the model card
def write_model_card(folder: Path) -> None:
    """README.md of a model folder, from its unlearn_args.json and, once evaluated, its report.json."""
    made = json.loads((folder / "unlearn_args.json").read_text(encoding="utf-8"))
    report_file = folder / "report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else None
    card = _pages.get_template("model_card.md").render(
        options=made["options"], run=made["run"], rows=table_rows(report) if report else []
    )
    atomic_write_text(folder / "README.md", card)
