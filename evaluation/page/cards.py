"""The three cards at the top of the page: what was found, in a sentence, and the figure that decided."""

from __future__ import annotations

import dataclasses

from evaluation.page.numbers import Bar, bar
from evaluation.page.wording import bound_text, figure_text, figure_title

HEADS = {"forgotten": "Forgotten", "kept": "Kept", "resists": "Resists attacks"}
# what a part of the verdict can say -> (colour class, icon); the words stand beside them, so neither is needed to read
LOOKS = {"yes": ("good", "check"), "no": ("bad", "cross"), "too few rows to say": ("open", "question"),
         "shown, not judged": ("none", "eye")}  # fmt: skip
NOTHING_SAID = ("none", "dash")
MOST_TELLING = ("no", "too few rows to say", "yes", "not measured")


@dataclasses.dataclass(frozen=True)
class ShownCheck:
    """One figure against its bound, in words and as a bar."""

    figure: str  # as --require names it
    title: str
    value: str
    bound: str
    result: str
    bar: Bar | None
    colour: str
    icon: str


@dataclasses.dataclass(frozen=True)
class Card:
    """One part of the verdict. `deciding`: the check that the card shows, None if nothing was measured."""

    name: str
    head: str
    answer: str
    why: str
    colour: str
    icon: str
    deciding: ShownCheck | None
    checks: list[ShownCheck]


def verdict_cards(report: dict) -> list[Card]:
    """Return a card for each part of the verdict, in order."""
    cards = []
    for part in report["verdict"]["parts"]:
        colour, icon = look_of(part["answer"])
        decisive = deciding_check(part["checks"])
        cards.append(
            Card(name=part["name"], head=HEADS.get(part["name"], part["name"].capitalize()),
                 answer=part["answer"][:1].upper() + part["answer"][1:], why=part["why"], colour=colour, icon=icon,
                 deciding=shown_check(decisive) if decisive else None, checks=shown_checks(part["checks"]))
        )  # fmt: skip
    return cards


def look_of(answer: str) -> tuple[str, str]:
    """Return colour class and icon of an answer. A "yes" with a remark, such as which attacks were tried, is a yes."""
    return LOOKS.get(answer) or LOOKS.get(answer.partition(" (")[0], NOTHING_SAID)


def shown_checks(checks: list[dict]) -> list[ShownCheck]:
    """Return checks as they are shown."""
    return [shown_check(check) for check in checks]


def shown_check(check: dict) -> ShownCheck:
    """Return one check as it is shown."""
    value = figure_text(check["figure"], check["value"], check["low"], check["high"])
    return ShownCheck(check["figure"], figure_title(check["figure"]), value, bound_text(check), held(check["holds"]),
                      bar(check), *look_of(check["holds"]))  # fmt: skip


def held(holds: str) -> str:
    """Return whether a check holds, in words."""
    return {"yes": "holds", "no": "fails"}.get(holds, holds)


def deciding_check(checks: list[dict]) -> dict | None:
    """Return the check that says most: a failed one before an open one before one that holds; among these the one
    that is worst against its bound. None if nothing was measured."""
    measured = [check for check in checks if check["value"] is not None]
    return min(measured, key=lambda check: (MOST_TELLING.index(check["holds"]), slack(check)), default=None)


def slack(check: dict) -> float:
    """Return how far a figure is on the good side of its bound, as a share of the bound; negative on the bad side."""
    distance = check["value"] - check["bound"]
    if check["sign"] == "==":
        distance = -abs(distance)
    elif check["sign"].startswith("<"):
        distance = -distance
    return distance / (abs(check["bound"]) or 1.0)
