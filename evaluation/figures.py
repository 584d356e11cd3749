"""Every figure of report.json by its name, as --require and the verdict read it.

    SIDE[.GROUP].MEASURE[.before|.retrained|.change|.ratio]     forget.harmful (unseen).answered.ratio
    forget.SOURCE.auc_SCORE[.before|.retrained]                 forget.harmful.auc_min_k; with one source without it
    forget.forget_quality[_statistic][.before]                  TOFU's p-value, and the statistic of its KS test
    text.MEASURE[.before|.retrained|.change|.ratio]             text.perplexity.ratio
    attack.NAME[.VARIANT][.control|.counted]                    attack.relearn.counted
    lm_eval.TASK.METRIC[.before|.retrained|.change]             lm_eval.mmlu.acc.change

SIDE is forget or keep. GROUP is a group of the report, `all` (all groups that count, together; the default) or `worst`
(the group that is worst in this measure). A name without a column is that of the model after unlearning. Each name
takes a bound at its end, .low or .high, or .n, the number of rows: see `evaluation.requirements`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from evaluation.attacks import ATTACKS
from evaluation.attacks.base import CONTROL_NAMES, Attack
from evaluation.groups import unseen_groups
from evaluation.measures import HIGHER, LOWER, MEASURES, Measure
from evaluation.metrics.bounds import Z95, rate_difference
from evaluation.metrics.statistics import Estimate, wilson

SIDES = ("forget", "keep")
COLUMNS = ("before", "after", "retrained", "change", "ratio")
# of the forget side: the share left of the extraction strength above its floor, what is above it, and the floor
EXTRACTION = ("extraction_left", "extraction_excess", "extraction_floor")
SCORES = ("loss", "min_k", "min_40", "min_k_plus_plus", "zlib")  # of membership; MUSE's is Min-40 %
REFERENCE = "reference"  # a score against the retrained model: it has an AUC and no privacy leakage
QUALITY = {"forget_quality": "p_value", "forget_quality_statistic": "statistic"}  # figure: its key in the report
PAPER = ("diversity", "utility", "fluency")  # columns of Yao et al. 2023, besides a `harmful.JUDGE` for every judge
TEXT = {"perplexity": "perplexity_text", "mc1": "mc_data", "mc2": "mc_data"}  # measure of given text: its option
BOOTSTRAPPED = {*(measure.name for measure in MEASURES if not measure.is_rate), *TEXT, "extraction_left",
                "extraction_excess", "length_ratio_low", "length_ratio_high", "perplexity_ratio", "mc1_change",
                "mc2_change"}  # fmt: skip
PLAIN_NUMBERS = {"perplexity", "extraction_floor", *QUALITY}  # as they stand in the report: no interval, no rows
Found = dict[str, Estimate]


def figures(report: dict) -> Found:
    """Return every figure of a report by name. What the report did not measure has no rows or is not in it."""
    found: Found = {}
    for side in SIDES:
        groups = [group for group in report["groups"] if group["side"] == side]
        pooled = report.get("pooled", {}).get(side)
        for group in groups:
            found |= _entry(f"{side}.{group['name']}", group)
        if pooled:
            every = _entry(f"{side}.all", pooled)
            found |= every | {name.replace(".all", "", 1): figure for name, figure in every.items()}
        judged = [group for group in groups if group["counts"]]
        if side == "forget":
            names = unseen_groups(group["name"] for group in judged)
            judged = [group for group in judged if group["name"] in names]
        found |= _worst(side, [_entry("", group) for group in judged])
        found |= _early_names(side, judged, found)
    return found | _text(report) | _membership(report) | _attacks(report) | _lm_eval(report)


def point_values(report: dict) -> dict[str, float]:
    """Return the points of all figures that were measured, by name."""
    return {name: figure.value for name, figure in figures(report).items() if figure.value is not None}


def estimate(figure) -> Estimate:
    """Return a figure of report.json as it was made: an interval, a value with its standard error, or a number."""
    if not isinstance(figure, dict):
        return Estimate(figure, 0 if figure is None else 1, None, None)
    if "stderr" in figure and "low" not in figure:
        value, error = figure["value"], figure["stderr"]
        known = value is not None and isinstance(error, int | float) and math.isfinite(error)
        bounds = (value - Z95 * error, value + Z95 * error) if known else (None, None)
        return Estimate(value, 0 if value is None else 1, *bounds)
    return Estimate(**{name: figure.get(name) for name in ("value", "n", "low", "high")})


def rate_hits(rate: Estimate) -> int:
    """Return how many rows of a rate were hit."""
    return round(rate.value * rate.n) if rate.n else 0


def pooled_rate(rates: list[Estimate]) -> Estimate:
    """Return one rate over the rows of several."""
    hits, n = sum(rate_hits(rate) for rate in rates), sum(rate.n for rate in rates)
    return Estimate(hits / n if n else None, n, *wilson(hits, n))


def measure_of(name: str) -> tuple[str, str]:
    """Return the measure and the column of a figure's name, "" for none; the names of groups may hold anything."""
    place, _, last = name.rpartition(".")
    return (place.rpartition(".")[2], last) if last in COLUMNS else (last, "")


def is_bootstrapped(name: str) -> bool:
    """Return whether a figure's interval says nothing of few rows: a bootstrap's, or one by the harness's standard
    errors. That of a rate, of a ratio of rates or of an AUC is true of few rows as well."""
    measure, column = measure_of(name)
    if name.startswith("lm_eval."):  # a share's is Wilson's, but which metric is one does not show in its name
        return True
    return not name.startswith("attack.") and (measure in BOOTSTRAPPED or column == "change")


def has_interval(name: str) -> bool:
    """Return whether a figure is made with an interval."""
    measure, column = measure_of(name)
    return name.startswith(("attack.", "lm_eval.")) or measure not in PLAIN_NUMBERS or column in ("change", "ratio")


# ------------------------------------------------------------------------------------------------- groups
def _entry(prefix: str, entry: dict) -> Found:
    """Return the figures of a group, or of all groups of a side together."""
    found = {}
    for column in COLUMNS:
        found |= _column(prefix, column, entry.get(column) or {})
        paper = entry.get("paper", {}).get(column, {})
        flat = {key: value for key, value in paper.items() if key != "harmful"}
        harmful = {f"harmful.{judge}": value for judge, value in paper.get("harmful", {}).items()}
        found |= _column(prefix, column, flat | harmful)
    if extraction := entry.get("extraction"):
        found |= {f"{prefix}.extraction_{name}": estimate(extraction[name]) for name in ("left", "excess", "floor")}
    return found | {f"{prefix}.{name}": estimate(value) for name, value in (entry.get("pair") or {}).items()}


def _column(prefix: str, column: str, measured: dict) -> Found:
    """Return the figures of one column; those of the model after unlearning under their bare name as well."""
    named = {f"{prefix}.{name}": estimate(value) for name, value in measured.items()}
    return {f"{name}.{column}": value for name, value in named.items()} | (named if column == "after" else {})


def _worst(side: str, groups: list[Found]) -> Found:
    """Return the figures of the group that is worst in each, by what `evaluation.measures` calls better."""
    found = {}
    for name in dict.fromkeys(name for group in groups for name in group):
        pick = _worse(side, name.split(".")[1])
        rows = [group[name] for group in groups if name in group and group[name].value is not None]
        if rows and pick:
            found[f"{side}.worst{name}"] = pick(rows, key=lambda row: row.value)
    return found


def _worse(side: str, measure: str) -> Callable | None:
    """Return `max` of a measure of which more is worse on a side, `min` of one of which less is; else None."""
    better = next((one.better.get(side) for one in MEASURES if one.name == measure), None)
    return {LOWER: max, HIGHER: min}.get(better)


def _early_names(side: str, groups: list[dict], found: Found) -> Found:
    """Return the figures whose names and meaning come from earlier versions.

    keep.retained, keep.similarity and keep.on_topic_ratio are those of the worst group. forget.on_topic is over prompts
    alone, and is reported only if the original was on topic once, since otherwise there was nothing to forget.
    """
    if side == "keep":
        names = {"retained": "retained", "similarity": "similarity", "on_topic_ratio": "on_topic.ratio"}
        early = {f"keep.{name}": found[f"keep.worst.{full}"] for name, full in names.items()
                 if f"keep.worst.{full}" in found}  # fmt: skip
        lengths = [estimate(g["pair"]["length_ratio"]) for g in groups if g.get("pair", {}).get("length_ratio")]
        lengths = [length for length in lengths if length.value is not None]
        for name, pick in (("low", min), ("high", max)) if lengths else ():
            early[f"keep.length_ratio_{name}"] = pick(lengths, key=lambda length: length.value)
        return early
    prompts = [group for group in groups if not group.get("text")]
    before, after = (pooled_rate([estimate(g[label]["on_topic"]) for g in prompts if "on_topic" in g.get(label, {})])
                     for label in ("before", "after"))  # fmt: skip
    if not before.value:
        nothing = Estimate(None, 0, 0.0, 1.0)
        return {name: nothing for name in ("forget.on_topic", "forget.on_topic.after") if name in found}
    ratio = after.value / before.value
    paired = found.get("forget.on_topic.ratio")
    has_interval = paired is not None and paired.value is not None and math.isclose(paired.value, ratio)
    return {"forget.on_topic": after, "forget.on_topic.after": after, "forget.on_topic.before": before,
            "forget.on_topic_ratio": paired if has_interval else Estimate(ratio, before.n, None, None)}  # fmt: skip


# -------------------------------------------------------------------- text, membership, attacks, the harness
def _text(report: dict) -> Found:
    """Return the figures on given text."""
    found = {}
    for measure, columns in (report.get("given_text") or {}).items():
        for column in COLUMNS:
            if column in columns:
                found |= _column("text", column, {measure: columns[column]})
    early = {"keep.perplexity_ratio": "text.perplexity.ratio", "keep.mc1_change": "text.mc1.change",
             "keep.mc2_change": "text.mc2.change"}  # fmt: skip
    return found | {name: found[full] for name, full in early.items() if full in found}


def _membership(report: dict) -> Found:
    """Return the AUC of every membership score, privacy leakage, and TOFU's forget quality."""
    found, entries = {}, (report.get("membership") or {}).get("entries", [])
    for entry in entries:
        for prefix in (f"forget.{entry['source']}", "forget")[: 2 if len(entries) == 1 else 1]:
            for column in ("before", "after", "retrained"):
                scores = {f"auc_{score}": value for score, value in entry.get(column, {}).items()}
                found |= _column(prefix, column, scores)
            leakage = entry.get("privacy_leakage") or {}
            found |= {f"{prefix}.privacy_leakage_{score}": estimate(value) for score, value in leakage.items()}
            if first := next((leakage[score] for score in ("min_40", *leakage) if score in leakage), None):
                found[f"{prefix}.privacy_leakage"] = estimate(first)
    if quality := report.get("forget_quality"):
        for column, of_model in (("before", quality.get("before") or {}), ("after", quality)):
            found |= _column("forget", column, {name: of_model.get(key) for name, key in QUALITY.items()})
    return found


def counted_back(entry: dict, z: float = Z95) -> Estimate:
    """Return what an attack's entry counts against the model: the rate of what came back.

    Where the control is a model that never knew the rows, what it learns as fast has not come back, and is taken off.
    Where the control is the original, it shows what could come back at most, and nothing is taken off.
    """
    back, control = estimate(entry["back"]), entry.get("control")
    if not has_unknowing_control(entry):
        return Estimate(back.value, back.n, *wilson(rate_hits(back), back.n, z))
    other = estimate(control)
    return rate_difference(rate_hits(back), back.n, rate_hits(other), other.n, z)


def has_unknowing_control(entry: dict) -> bool:
    """Return whether the control of an attack's entry is a model that never knew the rows."""
    return bool(entry.get("control")) and entry.get("control_name") == CONTROL_NAMES["retrained"]


def _attacks(report: dict) -> Found:
    """Return the figures of every attack, of its worst variant and of the worst attack; controls are no attacks."""
    found, rows = {}, [entry for entry in report.get("attacks") or [] if not entry.get("is_control")]
    for name in dict.fromkeys(entry["name"] for entry in rows):
        variants = [entry for entry in rows if entry["name"] == name]
        for entry in variants:
            found |= _attack(f"attack.{name}.{entry['variant']}", entry)
        found |= _worst_attack(f"attack.{name}", variants)
    return found | _worst_attack("attack.worst", rows)


def _attack(prefix: str, entry: dict) -> Found:
    """Return what came back, what the control gives, and what counts, of one variant."""
    found = {prefix: estimate(entry["back"])}
    if entry.get("control"):
        found[f"{prefix}.control"] = estimate(entry["control"])
    if entry.get("judged", True):
        found[f"{prefix}.counted"] = counted_back(entry)
    return found


def _worst_attack(prefix: str, entries: list[dict]) -> Found:
    """Return the figures of the variant that brings most back, and of the judged one that counts most."""
    found, rows = {}, [entry for entry in entries if entry["back"]["value"] is not None]
    if rows:
        found = _attack(prefix, max(rows, key=lambda entry: entry["back"]["value"]))
    counted = [counted_back(entry) for entry in rows if entry.get("judged", True)]
    if counted := [figure for figure in counted if figure.value is not None]:
        found[f"{prefix}.counted"] = max(counted, key=lambda figure: figure.value)
    return found


def _lm_eval(report: dict) -> Found:
    """Return the metrics of the harness's tasks."""
    found = {}
    for task, metrics in (report.get("lm_eval") or {}).items():
        for metric, columns in metrics.items():
            for column in COLUMNS:
                if column in columns:
                    found |= _column(f"lm_eval.{task}", column, {metric: columns[column]})
    return found


# ------------------------------------------------------------------------- the names before anything is measured
def known_names(groups, options, attacks: list[str], harness: dict[str, list[str] | None]) -> dict[str, str]:
    """Return the names that a report can have, each with the option to be given first ("": measured as it is).

    `groups`: those of `evaluation.groups`. harness: the metrics of every task of --lm_eval. Variants of attacks and the
    metrics of a task that has None show only when they have run.
    """
    known: dict[str, str] = {}
    retrained = "" if options.retrained_name else "--retrained_name"
    for side in SIDES:
        names = [f"{side}.{group.name}" for group in groups if group.side == side]
        for measure in (measure for measure in MEASURES if side in measure.better):
            places = [side, f"{side}.all", *names] + ([f"{side}.worst"] if _worse(side, measure.name) else [])
            for prefix in places:
                known |= _names(prefix, (measure.name,), retrained, _columns(measure))
        for prefix in names:
            judges = [f"harmful.{judge}" for judge in options.judge_model]
            known |= _names(prefix, (*PAPER, *judges), None, COLUMNS[:2])
    places = ("forget", "forget.all", *(f"forget.{group.name}" for group in groups if group.side == "forget"))
    known |= {f"{place}.{name}": "" for place in places for name in EXTRACTION}
    known |= dict.fromkeys(("forget.on_topic_ratio", "keep.on_topic_ratio", "keep.length_ratio_low",
                            "keep.length_ratio_high"), "")  # fmt: skip
    for measure, option in TEXT.items():
        need = "" if getattr(options, option) else f"--{option}"
        columns = (*COLUMNS[:3], "ratio" if measure == "perplexity" else "change")
        known |= {name: need or missing for name, missing in _names("text", (measure,), retrained, columns).items()}
        known[f"keep.{measure}_{'ratio' if measure == 'perplexity' else 'change'}"] = need
    given = [name for name in ("holdout_data", "holdout_text") if getattr(options, name, None)]
    holdout = "" if given else "--holdout_data"
    for prefix in ("forget", *dict.fromkeys(f"forget.{group.source}" for group in groups if group.side == "forget")):
        scores = _names(prefix, [f"auc_{score}" for score in (*SCORES, REFERENCE)], retrained, COLUMNS[:3])
        known |= {name: holdout or missing or (retrained if "auc_reference" in name else "")
                  for name, missing in scores.items()}  # fmt: skip
        leakages = (f"{prefix}.privacy_leakage", *(f"{prefix}.privacy_leakage_{score}" for score in SCORES))
        known |= dict.fromkeys(leakages, holdout or retrained)
    known |= dict.fromkeys(_names("forget", tuple(QUALITY), None, COLUMNS[:2]), retrained)
    every = [name for name, attack in ATTACKS.items() if isinstance(attack, Attack)]
    for name in (*every, "worst"):
        need = "" if (name in attacks or (name == "worst" and set(every) & set(attacks))) else "--attacks"
        known |= dict.fromkeys((f"attack.{name}", f"attack.{name}.control", f"attack.{name}.counted"), need)
    for task, metrics in harness.items():
        known |= _names(f"lm_eval.{task}", metrics or (), retrained)
    return known


def _columns(measure: Measure) -> tuple[str, ...]:
    """Return the columns of a measure."""
    if measure.kind == "pair":
        return ()
    return COLUMNS if measure.changes and measure.is_rate else COLUMNS[:4] if measure.changes else COLUMNS[:3]


def _names(prefix: str, measures, retrained: str | None, columns=COLUMNS) -> dict[str, str]:
    """Return the names of some measures, each with the option that it needs. `retrained`: that of its column."""
    found = {f"{prefix}.{measure}": "" for measure in measures}
    for column in columns:
        need = (retrained or "") if column == "retrained" else ""
        found |= {f"{prefix}.{measure}.{column}": need for measure in measures}
    return found
