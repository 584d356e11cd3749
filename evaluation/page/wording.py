"""What figures are called where people read them."""

from __future__ import annotations

import dataclasses

from evaluation.measures import MEASURES
from evaluation.page.numbers import decimal, percent, points

REGISTERED = {measure.name: measure for measure in MEASURES}
PLACES = {"forget": "forget side", "keep": "keep side", "text": "given text", "lm_eval": "lm-evaluation-harness"}
COLUMNS = {"before": "before", "after": "", "retrained": "retrained", "change": "change", "ratio": "after / before",
           "control": "control", "counted": "less the control"}  # fmt: skip
ENDS = {"low": "lower end of the interval", "high": "upper end of the interval", "n": "rows"}
GROUPS = {"all": "", "worst": "worst group"}
TITLES = {"mc1": "MC1", "mc2": "MC2"}
SHARES = ("mc1", "mc2", "harmful")  # rates that are no measure of answers
BOUNDS = {"<": "below", "<=": "at most", "==": "exactly", ">=": "at least", ">": "above"}


def measure_title(name: str) -> str:
    """Return the head of a measure's column."""
    known = REGISTERED.get(name)
    return known.title if known else TITLES.get(name, name.replace("_", " "))


def measure_meaning(name: str) -> str:
    """Return the sentence that says what a measure is; empty for one that the registry does not hold."""
    return REGISTERED[name].meaning if name in REGISTERED else ""


def is_rate(name: str) -> bool:
    """Return whether a measure is a share of prompts, shown in percent."""
    return name in SHARES or bool(name in REGISTERED and REGISTERED[name].is_rate)


def measure_text(name: str, figure: dict | None) -> str:
    """Return a measure's figure with its interval."""
    return percent(figure) if is_rate(name) else decimal(figure)


def change_text(name: str, figure: dict | None) -> str:
    """Return the paired change of a measure with its interval."""
    return points(figure) if is_rate(name) else decimal(figure)


# ------------------------------------------------------------------------------------- figures of --require
@dataclasses.dataclass(frozen=True)
class FigureName:
    """The parts of a figure's name. `group`: as in the report, "all" or "worst"; of an attack, its variant.
    `column`: of COLUMNS, `end`: of ENDS; both may be empty."""

    place: str
    group: str
    measure: str
    column: str
    end: str


def parse_figure(name: str) -> FigureName:
    """Return the parts of a figure's name, such as 'forget.harmful (unseen).answered.ratio.high'."""
    place, _, rest = name.partition(".")
    rest, end = _without_last(rest, ENDS)
    rest, column = _without_last(rest, COLUMNS)
    if place == "attack":
        measure, _, group = rest.partition(".")
    elif place in ("text", "lm_eval"):
        measure, group = rest, ""
    elif "harmful." in rest and rest.partition("harmful.")[0][-1:] in ("", "."):  # the name of a judge model follows
        group, _, judge = rest.partition("harmful.")
        measure, group = f"harmful ({judge})", group.rstrip(".")
    else:
        group, _, measure = rest.rpartition(".")
    for early in ("ratio", "change"):  # names of earlier versions, such as on_topic_ratio
        base = measure.removesuffix(f"_{early}")
        if base != measure and not column and measure not in REGISTERED and (base in REGISTERED or base in SHARES):
            measure, column = base, early
    return FigureName(place, group, measure, column, end)


def _without_last(name: str, known) -> tuple[str, str]:
    """Split off the last part of a name if it is a known one."""
    start, _, last = name.rpartition(".")
    return (start, last) if start and last in known else (name, "")


def figure_title(figure: str) -> str:
    """Return a figure of --require in words: 'forget.answered.ratio' -> 'answered, forget side, after / before'."""
    name = parse_figure(figure)
    if name.place == "attack":
        which = "worst attack" if name.measure == "worst" else name.measure.replace("_", " ")
        words = [which, name.group, "came back"]
    else:
        words = [measure_title(name.measure), PLACES.get(name.place, name.place), GROUPS.get(name.group, name.group)]
    return ", ".join(filter(None, [*words, COLUMNS.get(name.column, ""), ENDS.get(name.end, "")]))


def figure_text(figure: str, value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Return a figure of --require as it is shown: a rate in percent, a change of rates in points, else a number."""
    name, estimate = parse_figure(figure), {"value": value, "low": low, "high": high}
    if name.end == "n":
        return decimal(estimate, 0)
    if name.place != "attack" and not is_rate(name.measure.partition(" (")[0]):
        return decimal(estimate)
    return points(estimate) if name.column == "change" else percent(estimate)


def bound_text(check: dict) -> str:
    """Return a check's bound in words, such as 'at most 10 %'."""
    return f"{BOUNDS[check['sign']]} {figure_text(check['figure'], check['bound'])}"
