"""One figure against one bound, judged by its interval, and the sentence that says so."""

from __future__ import annotations

import dataclasses
import math

from evaluation.figures import Found, rate_hits
from evaluation.metrics.statistics import Estimate

YES, NO, TOO_FEW, NOT_MEASURED = "yes", "no", "too few rows to say", "not measured"
OPERATORS = {
    "<": lambda value, bound: value < bound,
    "<=": lambda value, bound: value <= bound,
    "==": lambda value, bound: math.isclose(value, bound, rel_tol=1e-9, abs_tol=1e-9),
    ">=": lambda value, bound: value >= bound,
    ">": lambda value, bound: value > bound,
}
FEWEST_ROWS = 10  # of which a bootstrap's interval says something


@dataclasses.dataclass(frozen=True)
class Check:
    """One figure against one bound. `holds`: yes, no, too few rows to say, or not measured.

    `alarm`: the check can only say no; where too few rows can tell, it says yes, since another check covers these rows.
    """

    figure: str
    sign: str
    bound: float
    value: float | None
    n: int
    low: float | None
    high: float | None
    holds: str
    why: str
    alarm: bool = False


def compare(figure: Estimate | None, sign: str, bound: float, *, is_rate: bool = True) -> str:
    """Return whether a whole interval lies on the right side of a bound (yes), on the wrong one (no), or neither.

    `is_rate`: the interval is one of counts, which is true of few rows as well; a bootstrap's needs more.
    """
    if figure is None or figure.value is None:
        return NOT_MEASURED
    if figure.low is None or figure.high is None or not (is_rate or figure.n >= FEWEST_ROWS):
        return TOO_FEW
    near, far = (figure.low, figure.high) if sign in ("<", "<=") else (figure.high, figure.low)
    return YES if OPERATORS[sign](far, bound) else TOO_FEW if OPERATORS[sign](near, bound) else NO


def check_figure(found: Found, figure: str, sign: str, bound: float, sentence: str, **kinds) -> Check:
    """Return a figure against its bound. sentence: with {hits} of {n} rows and {value} (low to high) to be filled in.

    kinds: `is_rate` as for `compare`; `alarm` as in Check; `form`: how value and bound are written.
    """
    one = found.get(figure) or Estimate(None, 0, None, None)
    return check_estimate(one, figure, sign, bound, sentence, **kinds)


def check_estimate(
    one: Estimate, figure: str, sign: str, bound: float, sentence: str, *, is_rate=True, alarm=False, form=None
) -> Check:
    """Return the check of one estimate, under the name of its figure."""
    holds, form = compare(one, sign, bound, is_rate=is_rate), form or per_cent
    if one.value is None:
        why = NOT_MEASURED
    else:
        limit = f"at most {form(bound)} allowed" if sign == "<=" else f"at least {form(bound)} needed"
        why = f"{sentence.format(hits=rate_hits(one), n=one.n, value=_with_interval(one, form))}, {limit}"
        why += (": not shown to fail" if alarm else f": {TOO_FEW}") if holds == TOO_FEW else ""
    holds = YES if alarm and holds == TOO_FEW else holds
    return Check(figure, sign, bound, one.value, one.n, one.low, one.high, holds, why, alarm)


def literal(text: str) -> str:
    """Return a text, such as the name of a file, that stands as it is in a sentence to be filled in."""
    return text.replace("{", "{{").replace("}", "}}")


def per_cent(share: float, unit: str = " %") -> str:
    """Return a share in per cent."""
    return f"{100 * share:.0f}{unit}"


def plain(value: float, unit: str = "") -> str:
    return f"{value:.2f}{unit}"


def points(change: float, unit: str = " points") -> str:
    return f"{100 * change:+.1f}{unit}"


def _with_interval(one: Estimate, form) -> str:
    """Return an estimate as it is read, such as '3 % (1 to 9)'."""
    return form(one.value) + ("" if one.low is None else f" ({form(one.low, '')} to {form(one.high, '')})")
