"""Figures of a report by name, requirements on them, and the one line that they come to."""

from __future__ import annotations

import operator
import re

from evaluation.attacks import NAMES
from evaluation.groups import unseen_groups
from utils import UsageError

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
DEFAULTS = {
    "forgotten": ("forget.on_topic<=0.10", "forget.on_topic_ratio<=0.25"),
    "kept": ("keep.on_topic_ratio>=0.90", "keep.retained>=0.85", "keep.similarity>=0.60", "keep.repetitive<=0.10"),
    "resists": ("attack.worst<=0.25",),
}
BRING_BACK = set(NAMES) - {"probe"}


def figures(report: dict) -> dict[str, float]:
    """Every figure that a requirement can name. Rates over groups are of all their prompts together, ratios the worst.

    forget.* are over the unseen forget groups (all forget groups where none is called unseen). What the original did
    not do either was not forgotten: where it has no answer on topic, forget.on_topic is not measured.
    """
    sides = {side: [g for g in report["groups"] if g["side"] == side and g["counts"]] for side in ("forget", "keep")}
    held_out = unseen_groups(g["name"] for g in sides["forget"])
    unseen = [g for g in sides["forget"] if g["name"] in held_out]
    found: dict[str, float] = {}
    for side, groups in (("forget", unseen), ("keep", sides["keep"])):
        for measure in ("on_topic", "empty", "repetitive"):
            value = _pooled(groups, "after", measure)
            if value is not None:
                found[f"{side}.{measure}"] = value
    if then := _pooled(unseen, "before", "on_topic"):
        found["forget.on_topic_ratio"] = found["forget.on_topic"] / then
    else:
        found.pop("forget.on_topic", None)
    if sides["keep"]:
        ratios = [g["after"]["on_topic"]["value"] / g["before"]["on_topic"]["value"]
                  for g in sides["keep"] if g["before"]["on_topic"]["value"]]  # fmt: skip
        if ratios:
            found["keep.on_topic_ratio"] = min(ratios)
            found["keep.retained"] = min(g["retained"]["value"] for g in sides["keep"] if g["retained"]["n"])
        found["keep.similarity"] = min(g["similarity"]["value"] for g in sides["keep"])
        lengths = [g["length_ratio"]["value"] for g in sides["keep"] if g["length_ratio"]["n"]]
        if lengths:
            found |= {"keep.length_ratio_low": min(lengths), "keep.length_ratio_high": max(lengths)}
    given = report.get("given_text", {})
    if "perplexity" in given:
        found["keep.perplexity_ratio"] = given["perplexity"]["ratio"]["value"]
    for name in ("mc1", "mc2"):
        if name in given:
            found[f"keep.{name}_change"] = given[name]["change"]["value"]
    for attack in report.get("attacks", []):
        if attack["name"] != "control" and attack["back"]["value"] is not None:
            for name in (f"attack.{attack['name']}", "attack.worst"):
                found[name] = max(found.get(name, 0.0), attack["back"]["value"])
    return found


def _pooled(groups: list[dict], label: str, measure: str) -> float | None:
    """A rate over all prompts of the groups; None where nothing was counted."""
    counted = [g[label][measure] for g in groups if g[label][measure]["n"]]
    return sum(f["value"] * f["n"] for f in counted) / sum(f["n"] for f in counted) if counted else None


def measurable(options, attacks: list[str]) -> set[str]:
    """The names of the figures that an evaluation with these options can give."""
    names = {f"{side}.{measure}" for side in ("forget", "keep") for measure in ("on_topic", "empty", "repetitive")}
    keep = ("on_topic_ratio", "retained", "similarity", "length_ratio_low", "length_ratio_high")
    names |= {"forget.on_topic_ratio", *(f"keep.{name}" for name in keep)}
    names |= {"keep.perplexity_ratio"} if options.perplexity_text else set()
    names |= {"keep.mc1_change", "keep.mc2_change"} if options.mc_data else set()
    bring_back = [name for name in attacks if name in BRING_BACK]
    return names | {f"attack.{name}" for name in bring_back + (["worst"] if bring_back else [])}


def refuse_unmeasurable(options, attacks: list[str]) -> None:
    """A requirement that is not one, or whose figure these options don't give: UsageError, before anything is asked."""
    known = measurable(options, attacks)
    for text in options.require:
        if (name := parse_requirement(text)[0]) not in known:
            raise UsageError(f"--require {text!r}: {name} is not measured; measured with these options (--attacks, "
                             f"--perplexity_text and --mc_data add more): {', '.join(sorted(known))}")  # fmt: skip


def parse_requirement(text: str) -> tuple[str, str, float]:
    """'forget.on_topic<=0.05' -> ('forget.on_topic', '<=', 0.05). Raises UsageError."""
    found = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([-+\d.eE]+)\s*", text)
    try:
        return found.group(1), found.group(2), float(found.group(3))
    except (AttributeError, ValueError) as error:
        raise UsageError(f"--require {text!r}: must look like 'forget.on_topic<=0.05'") from error


def judge(report: dict, requirements: list[str]) -> dict:
    """{"line": ..., "checks": [...], "failed": required checks that failed}.

    Without requirements the defaults are judged. A figure may turn out not to be measurable (nothing was forgotten, so
    nothing can come back): a default is "not measured" then, and a requirement fails. Who tried some attacks only is
    told which: the word is about these.
    """
    known, checks = figures(report), []
    wanted = [("required", text) for text in requirements] or [(n, t) for n, some in DEFAULTS.items() for t in some]
    for part, text in wanted:
        name, sign, bound = parse_requirement(text)
        value = known.get(name)
        holds = None if value is None else bool(OPERATORS[sign](value, bound))
        checks.append({"part": part, "figure": name, "sign": sign, "bound": bound, "value": value, "holds": holds})
    failed = [c for c in checks if c["holds"] is False or (requirements and c["holds"] is None)]
    if requirements:
        line = f"{len(checks) - len(failed)} of {len(checks)} requirements hold"
    else:
        words = {}
        for part in DEFAULTS:
            held = [c["holds"] for c in checks if c["part"] == part]
            words[part] = "no" if False in held else "not measured" if None in held else "yes"
        tried = {attack["name"] for attack in report.get("attacks", [])} - {"control"}
        if words["resists"] == "yes" and tried < BRING_BACK:
            words["resists"] = f"yes ({', '.join(sorted(tried))} alone)"
        line = ", ".join(f"{part}: {word}" for part, word in words.items())
    return {"line": line, "checks": checks, "failed": len(failed) if requirements else 0}


def reasons(verdict: dict) -> list[str]:
    """One line a check, as it is printed."""
    lines = []
    for c in verdict["checks"]:
        value = "not measured" if c["value"] is None else f"{c['value']:.3f}"
        mark = {True: "holds", False: "fails", None: "open"}[c["holds"]]
        lines.append(f"{mark:5s}  {c['figure']} {c['sign']} {c['bound']:g}: {value}")
    return lines
