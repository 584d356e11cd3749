"""Reports of schema 5, made from what each row came to: for tests of figures, requirements and verdict."""

import dataclasses

from evaluation.metrics.bounds import paired_ratio
from evaluation.metrics.statistics import Estimate, rate

ANSWER, NONE = True, False


@dataclasses.dataclass
class Rows:
    """The rows of one group: whether each is answered before and after, and whether it gives its reference."""

    name: str
    side: str
    before: list[bool]
    after: list[bool]
    leak_before: list[bool] = dataclasses.field(default_factory=list)
    leak_after: list[bool] = dataclasses.field(default_factory=list)
    on_topic: tuple[list[bool], list[bool]] = ((), ())  # before, after
    repetitive: int = 0  # rows, of the model after
    similarity: float = 0.9
    judge: str = "outcome"
    judged: bool = True
    counts: bool = True
    text: bool = False


def flags(hits: int, n: int) -> list[bool]:
    """Return `hits` rows that are answered, and then the others."""
    return [ANSWER] * hits + [NONE] * (n - hits)


def mean_estimate(value: float, n: int) -> Estimate:
    """Return a mean whose interval is narrow, as of rows that are all alike."""
    return Estimate(value, n, value - 0.02, value + 0.02) if n else Estimate(None, 0, None, None)


def entry_of(rows: list[Rows]) -> dict:
    """Return the figures of some groups' rows together."""
    judged = [(x, y) for one in rows if one.judged for x, y in zip(one.before, one.after, strict=True)]
    leaks = [(x, y) for one in rows for x, y in zip(one.leak_before, one.leak_after, strict=True)]
    topics = [(x, y) for one in rows for x, y in zip(*one.on_topic, strict=True)]
    n = sum(len(one.before) for one in rows)
    columns = {"answered": judged, "on_topic": topics} | ({"leak": leaks} if rows[0].side == "forget" else {})
    before, after = ({name: rate(pair[i] for pair in pairs) for name, pairs in columns.items()} for i in (0, 1))
    repetitive = sum(one.repetitive for one in rows)
    newly = {"newly_answered": rate(y for x, y in judged if not x)} if rows[0].side == "forget" else {}
    return {
        "before": before | {"repetitive": rate([NONE] * n)},
        "after": after | {"repetitive": rate(flags(repetitive, n))},
        "change": {},
        "ratio": {name: paired_ratio([x for x, _ in pairs], [y for _, y in pairs]) for name, pairs in columns.items()},
        "pair": {"retained": rate(y for x, y in judged if x), **newly,
                 "similarity": mean_estimate(sum(one.similarity * len(one.before) for one in rows) / max(n, 1), n)},
    }  # fmt: skip


def make_report(*rows: Rows, pooled=None, **more) -> dict:
    """Return a report. The forget rows that count are those called unseen, else all. pooled: {side: {section: figures}}
    to be added to the pooled entries; more: further keys of the report."""
    groups = [{"name": one.name, "source": one.name.split(" (")[0], "split": "", "side": one.side, "n": len(one.before),
               "counts": one.counts, "text": one.text, "judge": one.judge, "judged": one.judged, **entry_of([one])}
              for one in rows]  # fmt: skip
    report = {"schema": 5, "groups": groups, "pooled": {}, "given_text": {}, "attacks": [],
              "options": {"attacks": ["none"]}, "retrained": None, **more}  # fmt: skip
    for side in ("forget", "keep"):
        counted = [one for one in rows if one.side == side and one.counts]
        unseen = [one for one in counted if one.name.endswith("(unseen)")]
        counted = unseen or counted
        names = [one.name for one in counted]
        entry = {"name": "all", "side": side, "groups": names, "n": 0, **entry_of(counted)} if counted else None
        for section, figures in ((pooled or {}).get(side) or {}).items():
            entry[section] |= figures
        report["pooled"][side] = entry
    return plain(report)


def attack(name: str, hits: int, n: int = 32, *, control=None, knows=True, judged=True, variant="plain") -> dict:
    """Return an attack's entry. control: (hits, n) of the original, or of a model that does not know the rows."""
    control_name = "the original" if knows else "a model that never knew the rows"
    return plain({"name": name, "family": "fine-tuning" if name == "relearn" else "prompt", "variant": variant,
                  "is_control": False, "judged": judged, "back": rate(flags(hits, n)),
                  "control": rate(flags(*control)) if control else None,
                  "control_name": control_name if control else None, "examples": []})  # fmt: skip


def plain(value):
    """Return a copy with every Estimate as report.json has it."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: plain(content) for key, content in value.items()}
    return [plain(content) for content in value] if isinstance(value, list) else value
