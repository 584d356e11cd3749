"""The figures of a report by name, the requirements on them, and the verdict in one line."""

from __future__ import annotations

import dataclasses
import operator
import re

from evaluation.attacks import ATTACKS
from evaluation.attacks.base import Attack, is_control
from evaluation.groups import LISTED, unseen_groups
from evaluation.measures import FIGURE_NAMES
from utils import UsageError

TEXT_NOTE = "forgotten text is not judged by topic: see its ROUGE-L recall, verbatim and NLL, before and after"
OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
DEFAULTS = {
    "forgotten": ("forget.on_topic<=0.10", "forget.on_topic_ratio<=0.25"),
    "kept": ("keep.on_topic_ratio>=0.90", "keep.retained>=0.85", "keep.similarity>=0.60", "keep.repetitive<=0.10"),
    "resists": ("attack.worst<=0.25",),
}
BRING_BACK = {name for name, attack in ATTACKS.items() if isinstance(attack, Attack)}  # probes bring nothing back


@dataclasses.dataclass(frozen=True)
class Check:
    """One requirement on one figure. `holds` is None if the figure was not measured."""

    part: str  # "required", or the part of the default verdict
    figure: str
    sign: str
    bound: float
    value: float | None
    holds: bool | None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict in one line, its checks, and how many required ones failed."""

    line: str
    checks: list[Check]
    failed: int


def figures(report: dict) -> dict[str, float]:
    """Return every figure that a requirement can name. Rates are over all prompts of the groups together, ratios are
    those of the worst group.

    forget.* are over the unseen forget groups, or over all forget groups if none is called unseen. forget.on_topic is
    over prompts alone, since a text goes on about its subject even if none of it is known. It is reported only if the
    original answered at least one of these prompts; otherwise there was nothing to forget.
    """
    sides = {side: [g for g in report["groups"] if g["side"] == side and g["counts"]] for side in ("forget", "keep")}
    unseen, prompts = _unseen(sides["forget"]), _unseen([g for g in sides["forget"] if not g.get("text")])
    found: dict[str, float] = {}
    for side, groups in (("forget", unseen), ("keep", sides["keep"])):
        for measure in FIGURE_NAMES:
            value = _pooled(prompts if (side, measure) == ("forget", "on_topic") else groups, "after", measure)
            if value is not None:
                found[f"{side}.{measure}"] = value
    if original := _pooled(prompts, "before", "on_topic"):
        found["forget.on_topic_ratio"] = found["forget.on_topic"] / original
    else:
        found.pop("forget.on_topic", None)
    return found | _keep_figures(sides["keep"]) | _text_figures(report) | _attack_figures(report)


def _unseen(groups: list[dict]) -> list[dict]:
    """Return the forget groups that are judged as unseen."""
    names = unseen_groups(g["name"] for g in groups)
    return [g for g in groups if g["name"] in names]


def _keep_figures(groups: list[dict]) -> dict[str, float]:
    """Return the worst ratios between after and before of the judged keep groups."""
    if not groups:
        return {}
    found = {}
    ratios = [g["after"]["on_topic"]["value"] / g["before"]["on_topic"]["value"]
              for g in groups if g["before"]["on_topic"]["value"]]  # fmt: skip
    if ratios:
        found["keep.on_topic_ratio"] = min(ratios)
        found["keep.retained"] = min(g["retained"]["value"] for g in groups if g["retained"]["n"])
    found["keep.similarity"] = min(g["similarity"]["value"] for g in groups)
    lengths = [g["length_ratio"]["value"] for g in groups if g["length_ratio"]["n"]]
    if lengths:
        found |= {"keep.length_ratio_low": min(lengths), "keep.length_ratio_high": max(lengths)}
    return found


def _text_figures(report: dict) -> dict[str, float]:
    """Return the figures on given text."""
    found, given = {}, report.get("given_text", {})
    if "perplexity" in given:
        found["keep.perplexity_ratio"] = given["perplexity"]["ratio"]["value"]
    for name in ("mc1", "mc2"):
        if name in given:
            found[f"keep.{name}_change"] = given[name]["change"]["value"]
    return found


def _attack_figures(report: dict) -> dict[str, float]:
    """Return the recovery rate of every attack's worst variant, and of the worst attack."""
    found: dict[str, float] = {}
    for attack in report.get("attacks", []):
        if not is_control(attack) and attack["back"]["value"] is not None:
            for name in (f"attack.{attack['name']}", "attack.worst"):
                found[name] = max(found.get(name, 0.0), attack["back"]["value"])
    return found


def _pooled(groups: list[dict], label: str, measure: str) -> float | None:
    """Return a rate over all prompts of the groups; None if nothing was counted."""
    counted = [g[label][measure] for g in groups if g[label][measure]["n"]]
    return sum(f["value"] * f["n"] for f in counted) / sum(f["n"] for f in counted) if counted else None


# ----------------------------------------------------------------------------------------------- requirements
def measurable(options, attacks: list[str]) -> set[str]:
    """Return the names of the figures that an evaluation with these options can give."""
    names = {f"{side}.{measure}" for side in ("forget", "keep") for measure in FIGURE_NAMES}
    keep = ("on_topic_ratio", "retained", "similarity", "length_ratio_low", "length_ratio_high")
    names |= {"forget.on_topic_ratio", *(f"keep.{name}" for name in keep)}
    names |= {"keep.perplexity_ratio"} if options.perplexity_text else set()
    names |= {"keep.mc1_change", "keep.mc2_change"} if options.mc_data else set()
    bring_back = [name for name in attacks if isinstance(ATTACKS[name], Attack)]
    return names | {f"attack.{name}" for name in bring_back + (["worst"] if bring_back else [])}


def refuse_unmeasurable(options, attacks: list[str]) -> None:
    """Raise UsageError, before a model is loaded, for a requirement that cannot be read or whose figure these options
    do not give."""
    known = measurable(options, attacks)
    for text in options.require:
        if (name := parse_requirement(text)[0]) not in known:
            raise UsageError(f"--require {text!r}: {name} is not measured; measured with these options (--attacks, "
                             f"--perplexity_text and --mc_data add more): {', '.join(sorted(known))}")  # fmt: skip


def parse_requirement(text: str) -> tuple[str, str, float]:
    """Return 'forget.on_topic<=0.05' as ('forget.on_topic', '<=', 0.05). Raises UsageError."""
    match = re.fullmatch(r"\s*([\w.]+)\s*(<=|>=|<|>)\s*([-+\d.eE]+)\s*", text)
    try:
        return match.group(1), match.group(2), float(match.group(3))
    except (AttributeError, ValueError) as error:
        raise UsageError(f"--require {text!r}: must look like 'forget.on_topic<=0.05'") from error


def judge(report: dict, requirements: list[str]) -> Verdict:
    """Check a report against the requirements, or against the defaults if there are none.

    A figure may turn out not to be measurable, as when nothing was forgotten and nothing can come back: a default is
    then "not measured", a requirement fails. If some attacks were not tried, the line names those that were.
    """
    known = figures(report)
    judged = unseen_groups(g["name"] for g in report["groups"] if g["side"] == "forget" and g["counts"])
    listed = bool(judged) and all(name.endswith(f"({LISTED})") for name in judged)
    asked = [("required", text) for text in requirements] or [(part, t) for part in DEFAULTS for t in DEFAULTS[part]]
    checks = [_check(part, text, known) for part, text in asked]
    failed = [c for c in checks if c.holds is False or (requirements and c.holds is None)]
    if requirements:
        line = f"{len(checks) - len(failed)} of {len(checks)} requirements hold"
    else:
        tried = {attack["name"] for attack in report.get("attacks", []) if not is_control(attack)}
        line = _default_line(checks, tried)
        if any(g["side"] == "forget" and g["counts"] and g.get("text") for g in report["groups"]):
            line += f" ({TEXT_NOTE})"
    if listed:
        line += "; the forget prompts were trained on, since none was held out"
    return Verdict(line, checks, len(failed) if requirements else 0)


def _check(part: str, requirement: str, known: dict[str, float]) -> Check:
    """Check one requirement, such as 'forget.on_topic<=0.05', against the figures that are known."""
    name, sign, bound = parse_requirement(requirement)
    value = known.get(name)
    holds = None if value is None else bool(OPERATORS[sign](value, bound))
    return Check(part, name, sign, bound, value, holds)


def _default_line(checks: list[Check], tried: set[str]) -> str:
    """Return the verdict of the default checks: a word for each part."""
    words = {}
    for part in DEFAULTS:
        held = [check.holds for check in checks if check.part == part]
        words[part] = "no" if False in held else "not measured" if None in held else "yes"
    if words["resists"] == "yes" and tried < BRING_BACK:
        words["resists"] = f"yes ({', '.join(sorted(tried))} alone)"
    return ", ".join(f"{part}: {word}" for part, word in words.items())


def reasons(verdict: dict) -> list[str]:
    """Return one line per check of report.json's verdict, as it is printed."""
    lines = []
    for check in verdict["checks"]:
        value = "not measured" if check["value"] is None else f"{check['value']:.3f}"
        mark = {True: "holds", False: "fails", None: "open"}[check["holds"]]
        lines.append(f"{mark:5s}  {check['figure']} {check['sign']} {check['bound']:g}: {value}")
    return lines
