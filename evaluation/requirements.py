"""Requirements on figures of a report, such as 'keep.answered.ratio.low>=90%': read, refused if wrong, and checked.

A bare name compares the figure's point. A name that ends in .low or .high compares that bound of its 95 % interval; it
then says "too few rows to say" where the interval holds the bound asked for, and that, too, fails.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from evaluation.checks import FEWEST_ROWS, NO, NOT_MEASURED, OPERATORS, TOO_FEW, YES, Check
from evaluation.figures import Found, has_interval, is_bootstrapped, known_names
from evaluation.metrics.statistics import Estimate
from utils import UsageError

BOUNDS = ("low", "high", "n")
IN_PER_CENT = "privacy_leakage"  # its unit in report.json, as in MUSE; every other figure is a share
SHAPE = "must look like 'forget.answered<=0.05', 'keep.answered.ratio.low>=90%'; the figures: docs/fields.md"


@dataclasses.dataclass(frozen=True)
class Requirement:
    """One --require as it was read. `of`: "low", "high" or "n" of the figure, "" for its point."""

    text: str
    figure: str
    of: str
    sign: str
    bound: float


def parse_requirement(text: str) -> Requirement:
    """Return a requirement as it was meant: 'keep.mc1_change>=-1%' has the bound -0.01. Raises UsageError."""
    match = re.fullmatch(r"\s*(\S.*?)\s*(<=|>=|==|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*", text)
    if not match:
        raise UsageError(f"--require {text!r}: {SHAPE}")
    name, sign, number, per_cent = match.groups()
    figure, _, of = name.rpartition(".")
    figure, of = (figure, of) if figure and of in BOUNDS else (name, "")
    is_share = not figure.rpartition(".")[2].startswith(IN_PER_CENT)
    return Requirement(text.strip(), figure, of, sign, float(number) / (100 if per_cent and is_share else 1))


def refuse_unmeasurable(options, groups, attacks: list[str], harness: dict[str, list[str] | None]) -> None:
    """Raise UsageError, before a model is loaded, for a requirement that cannot be read, that names no figure, or whose
    figure these options do not give.

    harness: every task and group of --lm_eval -> its metrics, None where they show only when it has run.
    """
    known = known_names(groups, options, attacks, harness)
    late = [f"attack.{name}." for name in attacks] + [
        f"lm_eval.{task}." for task, own in harness.items() if own is None
    ]
    for requirement in map(parse_requirement, options.require):
        _refuse_unknown(requirement, known, options, tuple(late))


def _refuse_unknown(requirement: Requirement, known: dict[str, str], options, late: tuple[str, ...]) -> None:
    """Raise UsageError unless these options can give the figure of a requirement. late: beginnings of names whose end
    shows only when it has run."""
    name, asked = requirement.figure, f"--require {requirement.text!r}"
    need = known.get(name)
    if name.startswith("lm_eval.") and not options.lm_eval:
        need = "--lm_eval"
    elif need is None and _may_be_late(name, late):
        need = ""
    if need:
        raise UsageError(f"{asked}: {name} is not measured without {need}{_which(name, need)}")
    if need == "" and requirement.of in ("low", "high") and not has_interval(name):
        raise UsageError(f"{asked}: {name} is one number without an interval; leave .{requirement.of} out")
    if need is None:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
        places = ", ".join(sorted({key.partition(".")[0] for key in known} | {"lm_eval"}))
        hint = f"did you mean {' or '.join(near)}?" if near else f"names begin with {places}; all: docs/fields.md"
        raise UsageError(f"{asked}: no figure is called {name}; {hint}")


def _may_be_late(name: str, late: tuple[str, ...]) -> bool:
    """Return whether a name can be an attack's variant or a group's metric, whose label shows when it has run; a
    mistyped column or bound is none."""
    label = next((name[len(prefix) :] for prefix in late if name.startswith(prefix)), "")
    return bool(label) and not difflib.get_close_matches(label, ("control", "counted", *BOUNDS), cutoff=0.6)


def _which(name: str, need: str) -> str:
    """Return which value of an option gives a figure, where that is known."""
    attack = name.split(".")[1]
    return f" {attack}" if need == "--attacks" and attack != "worst" else ""


# ------------------------------------------------------------------------------------------------- checks
def check_requirement(requirement: Requirement, found: Found) -> Check:
    """Check one requirement on the figures of a report. A figure that was not measured does not hold."""
    figure = found.get(requirement.figure) or Estimate(None, 0, None, None)
    compared = {"low": figure.low, "high": figure.high, "n": figure.n, "": figure.value}[requirement.of]
    if figure.value is None:
        holds = NOT_MEASURED
    elif compared is None or (requirement.of in ("low", "high") and _is_narrow(requirement.figure, figure)):
        holds = TOO_FEW
    else:
        holds = YES if OPERATORS[requirement.sign](compared, requirement.bound) else NO
    if holds == NO and requirement.of in ("low", "high") and _may_hold(figure, requirement):
        holds = TOO_FEW
    shown = NOT_MEASURED if figure.value is None else f"{figure.value:.3f}{_interval(figure)}"
    ending = f", {TOO_FEW}" if holds == TOO_FEW else ""
    return Check(requirement.figure + (f".{requirement.of}" if requirement.of else ""), requirement.sign,
                 requirement.bound, figure.value, figure.n, figure.low, figure.high, holds,
                 f"{requirement.text}: {shown}{ending}")  # fmt: skip


def _is_narrow(name: str, figure: Estimate) -> bool:
    """Return whether an interval is a bootstrap's of so few rows that it is narrower than what they tell."""
    return is_bootstrapped(name) and figure.n < FEWEST_ROWS


def _may_hold(figure: Estimate, requirement: Requirement) -> bool:
    """Return whether the other end of the interval keeps the bound: then more rows may show that all of it does."""
    other = figure.high if requirement.of == "low" else figure.low
    return other is not None and bool(OPERATORS[requirement.sign](other, requirement.bound))


def _interval(figure: Estimate) -> str:
    """Return an interval as it is printed, with its rows."""
    has_bounds = figure.low is not None and figure.high is not None
    return f" ({figure.low:.3f} to {figure.high:.3f}, n {figure.n})" if has_bounds else ""
