"""What a model still shows of the rows to forget, beside a model or rows without them.

Membership and privacy leakage, TOFU's forget quality, and extraction strength above its floor.
"""

from __future__ import annotations

from collections.abc import Iterator

from evaluation.groups import Group, unseen_groups
from evaluation.members import Members
from evaluation.metrics.membership import auc, privacy_leakage
from evaluation.metrics.memorisation import ExtractionLeft, extraction_left
from evaluation.metrics.tofu import forget_quality
from evaluation.scoring import RowScores
from sources.rows import Row

ALL = Members()  # of a model without a record, all forget rows but those held out
Scores = dict[str, list[list[RowScores | None]]]  # "before", "after", perhaps "retrained" -> what `score_rows` gave
FEWEST = 10  # rows on each side, below which the figures say next to nothing
NO_HOLDOUT = ("not measured: membership compares the trained forget rows with rows that no model ever saw; name such "
              "rows as --holdout_data or --holdout_text")  # fmt: skip
NO_MEMBERS = "not measured: no forget row that was trained on and that came with an answer was asked"

# report.json's name -> a number of a row, high for a member. "reference" compares with the retrained model, row by row.
MEMBERSHIP = {
    "loss": lambda s: -s.nll,
    "min_k": lambda s: s.min_k,
    "min_40": lambda s: s.min_40,
    "min_k_plus_plus": lambda s: s.min_k_plus_plus,
    "zlib": lambda s: s.zlib,
}


def membership_report(
    groups: list[Group],
    scores: Scores,
    holdout: dict[str, list[Row]],
    holdout_scores: dict[str, list[RowScores | None]],
    known: Members = ALL,
) -> dict:
    """Return report.json's "membership": an entry per forget source that has trained rows with answers.

    groups, scores: those of the evaluation. holdout, holdout_scores: rows that no model ever saw, from `read_holdout`,
    and every model's scores of them, from `score_holdout`.
    known: which rows are members. Without both kinds of rows, "not_measured" says why.
    """
    if not holdout:
        return {"entries": [], "not_measured": NO_HOLDOUT}
    entries = []
    for source, places in known.places(groups).items():
        members = _rows_of(scores, places)
        others = _of_kind(any(groups[i].is_text for i, _ in places), holdout, holdout_scores)
        if members["after"] and others["after"]:
            entries.append(_entry(source, members, others))
    return {"entries": entries, "not_measured": None if entries else NO_MEMBERS}


def _rows_of(scores: Scores, places: list[tuple[int, int]]) -> dict[str, list[RowScores]]:
    """Return every model's scores of the rows at these places that came with an answer."""
    return {label: [score for i, j in places if (score := by_group[i][j]) is not None]
            for label, by_group in scores.items()}  # fmt: skip


def _of_kind(
    is_text: bool, holdout: dict[str, list[Row]], holdout_scores: dict[str, list[RowScores | None]]
) -> dict[str, list[RowScores]]:
    """Return every model's scores of the holdout rows that are text, or of those that are not."""
    rows = [row for of_source in holdout.values() for row in of_source]
    return {label: [score for row, score in zip(rows, of_model, strict=True)
                    if row.is_text == is_text and score is not None]
            for label, of_model in holdout_scores.items()}  # fmt: skip


def _entry(source: str, members: dict[str, list[RowScores]], others: dict[str, list[RowScores]]) -> dict:
    """Return one source's AUC by model and score; with a retrained model, its privacy leakage too."""
    entry: dict = {"source": source, "members": len(members["after"]), "others": len(others["after"]), "note": None}
    if min(entry["members"], entry["others"]) < FEWEST:
        entry["note"] = (f"only {entry['members']} trained rows and {entry['others']} holdout rows: with fewer than "
                         f"{FEWEST} on a side, the figures say next to nothing")  # fmt: skip
    for label in members:
        entry[label] = {name: auc(map_scores(score, members[label]), map_scores(score, others[label]))
                        for name, score in MEMBERSHIP.items()}  # fmt: skip
    if "retrained" in members:
        entry["privacy_leakage"] = {name: privacy_leakage(entry["after"][name], entry["retrained"][name])
                                    for name in MEMBERSHIP}  # fmt: skip
        for label in members.keys() - {"retrained"}:
            entry[label]["reference"] = auc(*(
                [never_saw.nll - own.nll for own, never_saw in zip(side[label], side["retrained"], strict=True)]
                for side in (members, others)
            ))  # fmt: skip
    return entry


def map_scores(score, rows: list[RowScores]) -> list[float]:
    """Return one number a row."""
    return [score(row) for row in rows]


def forget_quality_report(
    groups: list[Group],
    scores: Scores,
    known: Members = ALL,
) -> dict | None:
    """Return report.json's "forget_quality": TOFU's KS test of the truth ratios after against those of the retrained
    model, on the trained forget rows, and the original's beside it. None without a retrained model or truth ratios.
    The arguments are those of `membership_report`."""
    if "retrained" not in scores:
        return None
    places = [place for of_source in known.places(groups).values() for place in of_source]
    ratios = {label: list(_truth_ratios(rows)) for label, rows in _rows_of(scores, places).items()}
    if not ratios["after"]:
        return None
    quality = {label: forget_quality(ratios[label], ratios["retrained"]) for label in ("after", "before")}
    return {**quality["after"], "n": len(ratios["after"]), "before": quality["before"]}


def _truth_ratios(rows: list[RowScores]) -> Iterator[float]:
    """Yield the truth ratios of the rows that have one."""
    return (row.truth_ratio for row in rows if row.truth_ratio is not None)


def extraction_report(
    groups: list[Group],
    scores: Scores,
    holdout: dict[str, list[Row]],
    holdout_scores: dict[str, list[RowScores | None]],
) -> dict[str, ExtractionLeft]:
    """Return what is left of the extraction strength of every forget group that counts, by its name, and over the
    groups that are pooled on the forget side as "all". A group without answers has no entry."""
    counted = {i: group for i, group in enumerate(groups) if group.side == "forget" and group.counts}
    pooled = unseen_groups(group.name for group in counted.values())
    places = {group.name: [i] for i, group in counted.items()}
    places["all"] = [i for i, group in counted.items() if group.name in pooled]
    found = {}
    for name, chosen in places.items():
        rows = _rows_of(scores, [(i, j) for i in chosen for j in range(len(groups[i].rows))])
        if not rows["after"]:
            continue
        others = _of_kind(any(groups[i].is_text for i in chosen), holdout, holdout_scores)
        of_rows, of_others = ({label: [row.extraction_strength for row in of_model] for label, of_model in side.items()}
                              for side in (rows, others))  # fmt: skip
        found[name] = extraction_left(
            of_rows["before"], of_rows["after"], num_tokens=[row.num_tokens for row in rows["after"]],
            retrained=of_rows.get("retrained"), holdout_before=of_others.get("before"),
            holdout_after=of_others.get("after"),
        )  # fmt: skip
    return found
