"""The tables of a report: every cell is text, the same in the terminal, on the page and in the model card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from evaluation.page.numbers import NO_FIGURE, decimal, percent, points, short, short_percent
from evaluation.page.pairs import models_of, shown_groups
from evaluation.page.rows import attack_text, counted_share, worst_attack
from evaluation.page.wording import change_text, is_rate, measure_meaning, measure_text, measure_title

REFERENCE_MEASURES = ("nll", "probability", "extraction_strength", "exact_memorisation", "recall", "verbatim",
                      "contains", "truth_ratio")  # fmt: skip
OUTCOMES = ("answered", "refused", "empty", "broken", "off_topic", "on_topic", "repetitive")


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows that have the same columns, the first of which names the row. `note`: how to read it, in full sentences."""

    title: str
    rows: list[dict[str, str]]
    note: str = ""


def group_table(report: dict) -> Table:
    """Return one row a group: how many prompts are answered, and how close the answers stay."""
    rows = []
    for group in shown_groups(report):
        row = {"group": group["name"], "side": group["side"], "n": str(group["n"])}
        for model in models_of(report):
            row[f"answered {model}"] = percent(group[model].get("answered")) if group["judged"] else "not judged"
        row["retained"] = short_percent(group["pair"].get("retained"))
        row["similarity"] = short(group["pair"].get("similarity"))
        rows.append(row)
    return Table("Answered, by group", rows, "In brackets the 95 % interval. Retained: of the prompts answered before, "
                 "those that are answered after. Similarity: cosine to the original's answer.")  # fmt: skip


def outcome_table(report: dict) -> Table:
    """Return what the answers were, by group: before -> after in percent."""
    rows = []
    for group in shown_groups(report):
        cells = {measure_title(name): arrows(group, models_of(report), name) for name in OUTCOMES}
        rows.append({"group": group["name"], "judge": group["judge"],
                     "language": group.get("language") or NO_FIGURE, **cells})  # fmt: skip
    return Table("What the answers were, in percent", rows, order_note(report) + meanings(OUTCOMES))


def memorisation_table(report: dict) -> Table:
    """Return what is left of the given answers, by group that has any: before -> after."""
    rows = []
    for group in shown_groups(report):
        names = [name for name in REFERENCE_MEASURES if (group["before"].get(name) or {}).get("n")]
        if names:
            cells = {measure_title(name): arrows(group, models_of(report), name) if name in names else NO_FIGURE
                     for name in REFERENCE_MEASURES}  # fmt: skip
            rows.append({"group": group["name"], "n": str(group["before"][names[0]]["n"]), **cells})
    empty = [title for title in (rows[0] if rows else ()) if all(row[title] == NO_FIGURE for row in rows)]
    rows = [{title: cell for title, cell in row.items() if title not in empty} for row in rows]
    return Table("What is left of the given answers", rows, order_note(report) + meanings(REFERENCE_MEASURES))


def arrows(entry: dict, models: list[str], name: str) -> str:
    """Return a measure of every model without intervals, such as '97 -> 6'; a dash if no model has one."""
    form = "{:z.2f}"
    figures = [entry.get(model, {}).get(name) for model in models]
    if all(figure is None or figure["value"] is None for figure in figures):
        return NO_FIGURE
    if is_rate(name):
        return " -> ".join(short_percent(figure).removesuffix(" %") for figure in figures)
    return " -> ".join(short(figure, form) for figure in figures)


def order_note(report: dict) -> str:
    """Return which model's figure stands where in a cell with arrows."""
    return f"{' -> '.join(models_of(report)).capitalize()}. "


def meanings(names: tuple[str, ...]) -> str:
    """Return the sentences that say what some measures are."""
    said = [(measure_title(name), measure_meaning(name)) for name in names]
    return " ".join(f"{title[:1].upper()}{title[1:]}: {meaning}" for title, meaning in said if meaning)


def figure_tables(report: dict) -> list[Table]:
    """Return every figure of every group, and of a side's groups together: one row a measure."""
    pooled = [entry | {"name": f"{side} side together: {', '.join(entry['groups'])}"}
              for side, entry in (report.get("pooled") or {}).items() if entry]  # fmt: skip
    tables = []
    for entry in pooled + shown_groups(report):
        rows = []
        for name in dict.fromkeys([*entry["before"], *entry["after"]]):
            if not entry["after"].get(name, {}).get("n"):
                continue
            row = {"measure": measure_title(name), "n": str(entry["after"][name]["n"])}
            row |= {model: measure_text(name, entry.get(model, {}).get(name)) for model in models_of(report)}
            row["after - before"] = change_text(name, entry["change"].get(name))
            row["after / before"] = percent(entry["ratio"].get(name))
            rows.append(row)
        models = dict.fromkeys([*models_of(report), "after - before", "after / before"], NO_FIGURE)
        for name, figure in entry["pair"].items():
            if figure["n"]:
                text = measure_text(name, figure)
                rows.append({"measure": measure_title(name), "n": str(figure["n"]), **models, "after": text})
        tables.append(Table(entry["name"], rows))
    return tables


def given_text_table(report: dict) -> Table:
    """Return the figures on text that the models are given."""
    rows, found = [], report.get("given_text") or {}
    if "perplexity" in found:
        f = found["perplexity"]
        rows.append({"measure": "perplexity (a word)", "n": f"{f['tokens']:,} tokens",
                     **{model: short(f.get(model)) for model in models_of(report)},
                     "change": f"x {decimal(f['ratio'], 3)} a token"})  # fmt: skip
    for name in (name for name in ("mc1", "mc2") if name in found):
        f = found[name]
        rows.append({"measure": f"multiple choice, {name.upper()}", "n": str(f["before"]["n"]),
                     **{model: f"{100 * f[model]['value']:.1f} %" if model in f else NO_FIGURE
                        for model in models_of(report)}, "change": points(f["change"])})  # fmt: skip
    return Table("Text that the models are given", rows, "Multiple choice: this suite's own reading of a task file, "
                 "which is not lm-evaluation-harness; --lm_eval runs that one.")  # fmt: skip


def paper_table(report: dict) -> Table:
    """Return the columns of Yao et al. 2023, by group: before -> after."""
    rows = []
    for group in (g for g in shown_groups(report) if g.get("paper")):
        before, after = group["paper"]["before"], group["paper"]["after"]
        row = {"group": group["name"], "n": str(group["n"])}
        for judge in after.get("harmful", {}):
            name = Path(judge).name
            alike = [other for other in after["harmful"] if Path(other).name == name]
            rates = [short_percent(side["harmful"][judge]).removesuffix(" %") for side in (before, after)]
            row[f"harmful, % ({name if len(alike) == 1 else judge})"] = " -> ".join(rates)
        for measure, title, form in (("diversity", "diversity", "{:z.2f}"), ("utility", "utility", "{:z.2f}"),
                                     ("fluency", "fluency (perplexity)", "{:.1f}")):  # fmt: skip
            row[title] = " -> ".join(short(side.get(measure), form) for side in (before, after))
        row["similarity"] = short(group["pair"].get("similarity"))
        rows.append(row)
    utility = report["options"].get("reward_model") or "the original's log-probability of a token"
    return Table("The columns of Yao et al. 2023", rows, "Before -> after. Diversity: share of different tokens in an "
                 f"answer. Utility: {utility}. Fluency: perplexity of the answers under the original; lower reads more "
                 "like it. Harmful: share that a judge model flags; an empty answer never is.")  # fmt: skip


def membership_table(report: dict) -> Table:
    """Return the AUC of every membership score and, with a retrained model, the privacy leakage."""
    rows, found = [], report.get("membership") or {}
    for entry in found.get("entries") or ():
        for score in entry["after"]:
            row = {"source": entry["source"], "score": score.replace("_", " "),
                   "members / others": f"{entry['members']} / {entry['others']}"}  # fmt: skip
            row |= {f"AUC {model}": decimal(entry.get(model, {}).get(score)) for model in models_of(report)}
            if report.get("retrained"):
                row["PrivLeak"] = decimal(entry.get("privacy_leakage", {}).get(score), 1)
            rows.append(row)
    note = found.get("not_measured") or ("AUC with which trained rows are told from rows that no model saw: 0.5 where "
                                         "membership does not show. PrivLeak: of MUSE, 0 where it shows no more than "
                                         "in the retrained model.")  # fmt: skip
    return Table("Does membership show?", rows, note)


def forget_quality_table(report: dict) -> Table:
    """Return TOFU's forget quality; no row where it was not measured."""
    found = report.get("forget_quality")
    if not found:
        return Table("Forget quality (TOFU)", [])
    models = {"before": found.get("before"), "after": found}
    rows = [{"model": model, "p-value": f"{of['p_value']:.2g}", "KS statistic": f"{of['statistic']:.2f}",
             "n": str(found["n"])} for model, of in models.items() if of]  # fmt: skip
    return Table("Forget quality (TOFU)", rows, "Kolmogorov-Smirnov test of the truth ratios against the retrained "
                 "model's: above 0.05 they cannot be told apart.")  # fmt: skip


def lm_eval_table(report: dict) -> Table:
    """Return lm-evaluation-harness's figures, with their standard error."""
    rows = []
    for task, metrics in (report.get("lm_eval") or {}).items():
        for metric, found in metrics.items():
            row = {"task": task, "metric": metric}
            for column in (*models_of(report), "change"):
                row[column] = with_error(found.get(column), "{:+.3f}" if column == "change" else "{:.3f}")
            rows.append(row)
    return Table("lm-evaluation-harness", rows, "Value +/- standard error, as the harness gives them.")


def with_error(found: dict | None, form: str) -> str:
    """Return a figure of the harness with its standard error, if it has one."""
    if not found or found.get("value") is None:
        return NO_FIGURE
    error = found.get("stderr")
    return form.format(found["value"]) + (f" +/- {error:.3f}" if isinstance(error, int | float) else "")


def attack_table(report: dict) -> Table:
    """Return the worst variant of every attack, worst first."""
    rows = [{"attack": a["name"], "worst variant": a["variant"], "of the forgotten, back": percent(a["back"]),
             "control": f"{a['control_name'] or 'control'}: {percent(a['control'])}" if a.get("control") else NO_FIGURE,
             "n": str(a["back"]["n"]), "judged": "yes" if a["judged"] else "shown only"}
            for a in worst_variants(report)]  # fmt: skip
    return Table("Attacks", rows)


def worst_variants(report: dict) -> list[dict]:
    """Return the worst variant of every attack, worst first."""
    worst: dict[tuple[str, bool], dict] = {}
    for attack in report.get("attacks") or ():
        key = (attack["name"], attack["judged"])  # what is only shown hides nothing that is judged
        known = worst.get(key)
        if not attack["is_control"] and (known is None or _back(attack) > _back(known)):
            worst[key] = attack
    return sorted(worst.values(), key=_back, reverse=True)


def _back(attack: dict) -> tuple:
    """Return an attack's place in the order: judged before shown, then by what counts as come back."""
    share = counted_share(attack)
    return attack["judged"], -1.0 if share is None else share


def judge_table(report: dict) -> Table:
    """Return who judged what."""
    rows = [{"judge": judge["name"], "kind": judge["kind"], "decides": ", ".join(judge["decides"]) or "nothing",
             "harmful classes": ", ".join(judge.get("harmful_classes") or ()) or NO_FIGURE, "limits": judge["limits"],
             "weights (SHA-256)": (judge.get("weights") or NO_FIGURE)[:12]} for judge in report["judges"]]  # fmt: skip
    return Table("Judges", rows)


def detail_tables(report: dict) -> list[Table]:
    """Return the tables of the page's details that have something to say, in order."""
    tables = [group_table(report), outcome_table(report), memorisation_table(report), given_text_table(report),
              lm_eval_table(report), membership_table(report), forget_quality_table(report), paper_table(report),
              judge_table(report)]  # fmt: skip
    return [table for table in tables if table.rows or table.title == "Does membership show?"]


def worst_attack_line(report: dict) -> str:
    """Return the worst judged attack in one line; that none was tried if so."""
    attack = worst_attack(report)
    if attack is None:
        return "No attack was tried." if not report.get("attacks") else "No attack was judged."
    return f"{attack['name']} ({attack['variant']}) brings back {attack_text(attack)} of {attack['back']['n']} prompts"
