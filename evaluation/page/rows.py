"""One row a group, and one row a variant of an attack: dots on a track, and the same numbers in words."""

from __future__ import annotations

import dataclasses

from evaluation.page.numbers import NO_FIGURE, Place, percent, place, short_percent
from evaluation.page.pairs import models_of, shown_groups
from evaluation.page.wording import parse_figure

SHAPES = {"before": "ring", "after": "square", "retrained": "diamond"}  # a shape of its own, for the colour-blind
EXAMPLES_SHOWN = 3
UNKNOWING = "a model that never knew the rows"  # the control of an attack that teaches rows


@dataclasses.dataclass(frozen=True)
class Dot:
    """One model's figure on a track and in words."""

    model: str
    shape: str
    place: Place | None
    text: str


@dataclasses.dataclass(frozen=True)
class GroupRow:
    """How many of a group's prompts are answered, by each model. `remark`: what a reader must know of the group.
    `is_total`: the row is of several groups together."""

    name: str
    n: int
    dots: list[Dot]
    remark: str
    retained: str
    is_total: bool = False


@dataclasses.dataclass(frozen=True)
class GroupTable:
    """The rows of one side. `bound`: where the verdict's bound on the share that is answered lies; None if it has
    none."""

    side: str
    rows: list[GroupRow]
    bound: float | None


def group_tables(report: dict) -> list[GroupTable]:
    """Return the groups of both sides as they are shown: first those of the verdict together, last those that are
    only shown."""
    tables = []
    for side in ("forget", "keep"):
        groups = [group for group in shown_groups(report) if group["side"] == side]
        if not groups:
            continue
        pooled = (report.get("pooled") or {}).get(side)
        models = models_of(report)
        rows = [group_row(group, models, remark_on(group)) for group in sorted(groups, key=lambda g: not g["counts"])]
        if pooled and len(pooled["groups"]) > 1:
            rows.insert(0, total_row(pooled, models, len(groups)))
        tables.append(GroupTable(side, rows, bound_on_answered(report, side)))
    return tables


def total_row(pooled: dict, models: list[str], shown: int) -> GroupRow:
    """Return the row of a side's groups together, with their names if some of the shown groups are not among them."""
    names = pooled["groups"]
    remark = "" if len(names) == shown else ", ".join(names)
    row = group_row(pooled | {"name": f"{len(names)} groups together"}, models, remark)
    return dataclasses.replace(row, is_total=True)


def group_row(entry: dict, models: list[str], remark: str) -> GroupRow:
    """Return the row of a group, or of a side's groups together."""
    shares = [(model, entry.get(model, {}).get("answered")) for model in models]
    dots = [Dot(model, SHAPES[model], place(share), percent(share)) for model, share in shares]
    return GroupRow(entry["name"], entry["n"], dots, remark, short_percent(entry["pair"].get("retained")))


def remark_on(group: dict) -> str:
    """Return what is special about a group; empty if nothing is."""
    if not group["judged"]:
        language = f" ({group['language']})" if group.get("language") else ""
        return f"not judged: {group['judge']} does not read this language{language}"
    return "" if group["counts"] else "shown, not judged"


def bound_on_answered(report: dict, side: str) -> float | None:
    """Return the verdict's bound on the share of a side that is answered, in percent."""
    return first_bound(report, lambda name: (name.place, name.measure, name.column) == (side, "answered", "")
                       and name.group in ("", "all"))  # fmt: skip


def first_bound(report: dict, is_meant) -> float | None:
    """Return the first bound on a rate that `is_meant` takes by its name, in percent: of the requirements, else of the
    verdict's own. None if there is none."""
    checks = [check for part in report["verdict"]["parts"] for check in part["checks"]]
    for check in report["verdict"]["requirements"] + checks:
        name = parse_figure(check["figure"])
        if name.end != "n" and is_meant(name):
            return 100 * check["bound"]
    return None


# ------------------------------------------------------------------------------------------------- attacks
@dataclasses.dataclass(frozen=True)
class AttackRow:
    """One variant of an attack. `control`: the same variant on a model that did not forget, or on one that never knew,
    in words; a dash if there is none. `bound`: where the verdict's bound lies, in percent, None if there is none;
    `is_over`: the share is above it."""

    name: str
    variant: str
    dot: Place | None
    control_dot: Place | None
    text: str
    control: str
    control_name: str
    n: int
    judged: bool
    bound: float | None
    is_over: bool
    examples: list[dict]


@dataclasses.dataclass(frozen=True)
class Family:
    """The variants of one kind of attack. `worst`: of each attack the worst variant, in order; `others`: the rest."""

    name: str
    worst: list[AttackRow]
    others: list[AttackRow]
    examples: list[dict]


def attack_families(report: dict) -> list[Family]:
    """Return the attacks by family; families and variants in order from the worst. What is only shown comes after what
    is judged, and controls are not among them."""
    families: dict[str, list[dict]] = {}
    for attack in report.get("attacks") or ():
        if not attack["is_control"]:
            families.setdefault(attack["family"], []).append(attack)
    ordered = {name: sorted(attacks, key=_from_worst) for name, attacks in families.items()}
    return [make_family(name, attacks, attack_bound(report))
            for name, attacks in sorted(ordered.items(), key=lambda entry: _from_worst(entry[1][0]))]  # fmt: skip


def make_family(name: str, attacks: list[dict], bound: float | None) -> Family:
    """Return a family of attacks that are in order from the worst. bound: of the verdict, in percent."""
    rows = [attack_row(attack, bound) for attack in attacks]
    first: dict[tuple[str, bool], AttackRow] = {}  # what is only shown hides nothing that is judged
    for row in rows:
        first.setdefault((row.name, row.judged), row)
    examples = [{**example, "name": row.name, "variant": row.variant} for row in rows for example in row.examples]
    others = [row for row in rows if first[row.name, row.judged] is not row]
    return Family(name, list(first.values()), others, examples[:EXAMPLES_SHOWN])


def _from_worst(attack: dict) -> tuple:
    """Return an attack's place in the order."""
    back = counted_share(attack)
    return not attack["judged"], back is None, -(back or 0.0), -(attack["back"]["high"] or 0.0)


def learned_anyway(attack: dict) -> float:
    """Return the share that a model gives under the same attack that never knew the rows: it has not come back. 0 if
    the control is the original, which shows the most that could come back."""
    control = attack.get("control")
    return control["value"] or 0.0 if control and attack.get("control_name") == UNKNOWING else 0.0


def counted_share(attack: dict) -> float | None:
    """Return the share that counts as come back; None if nothing was counted."""
    back = attack["back"]["value"]
    return None if back is None else back - learned_anyway(attack)


def attack_row(attack: dict, bound: float | None) -> AttackRow:
    """Return one variant as it is shown. bound: of the verdict, in percent."""
    back, control = attack["back"], attack.get("control")
    bound = min(100.0, bound + 100 * learned_anyway(attack)) if attack["judged"] and bound is not None else None
    is_over = bound is not None and 100 * (back["value"] or 0.0) > bound
    name = attack.get("control_name") or "control" if control else ""
    return AttackRow(attack["name"], attack["variant"], place(back), place(control), percent(back), percent(control),
                     name, back["n"], attack["judged"], bound, is_over, attack.get("examples") or [])  # fmt: skip


def control_rows(report: dict) -> list[AttackRow]:
    """Return the controls that are entries of their own: what a model gives that was never unlearned."""
    return [attack_row(attack, None) for attack in report.get("attacks") or () if attack["is_control"]]


def attack_bound(report: dict) -> float | None:
    """Return the verdict's bound on what attacks bring back, in percent; None if it has none."""
    return first_bound(report, lambda name: (name.place, name.measure) == ("attack", "worst"))


def worst_attack(report: dict) -> dict | None:
    """Return the judged variant that counts most; None if no attack was judged."""
    judged = [attack for attack in report.get("attacks") or () if attack["judged"] and not attack["is_control"]
              and attack["back"]["value"] is not None]  # fmt: skip
    return max(judged, key=counted_share, default=None)


def attack_text(attack: dict) -> str:
    """Return an attack's figure in words, with that of its control."""
    control = attack.get("control")
    beside = f"; {attack['control_name'] or 'control'}: {percent(control)}" if control else ""
    return f"{percent(attack['back'])}{beside}" if attack["back"]["value"] is not None else NO_FIGURE
