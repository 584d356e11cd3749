"""From the lines of scores.jsonl to the figures of report.json: groups, and each side's groups together."""

from __future__ import annotations

import dataclasses
import math

from evaluation.groups import unseen_groups
from evaluation.inputs import EvaluationInputs
from evaluation.judges.panel import OUTCOME
from evaluation.judging import Scores
from evaluation.measures import ANSWER_MEASURES, PAIR_MEASURES, Measure
from evaluation.membership import extraction_report, forget_quality_report, membership_report
from evaluation.metrics.bounds import paired_ratio
from evaluation.metrics.statistics import Estimate, mean, rate
from evaluation.model_run import compare_text_scores
from evaluation.stages import Record

SCHEMA = 5  # of report.json
MODEL_KINDS = ("classifier", "guard")
MODELS = ("before", "after", "retrained")


def group_entries(lines: list[dict], groups: list[dict]) -> list[dict]:
    """Return report.json's entry of every group. groups: what is known of each but its figures, with its `name`."""
    by_group: dict[str, list[dict]] = {group["name"]: [] for group in groups}
    for line in lines:
        by_group[line["group"]].append(line)
    return [{**group, "n": len(by_group[group["name"]]), **figures_of(by_group[group["name"]], group["side"])}
            for group in groups]  # fmt: skip


def pooled_entries(lines: list[dict], groups: list[dict]) -> dict[str, dict | None]:
    """Return the entries of both sides over all rows of the groups that count, None for a side without one.

    Of the forget side these are the unseen groups, or those listed if none is unseen.
    """
    counted = [group for group in groups if group["counts"]]
    names = {"forget": unseen_groups(g["name"] for g in counted if g["side"] == "forget"),
             "keep": [g["name"] for g in counted if g["side"] == "keep"]}  # fmt: skip
    pooled = {}
    for side, of_side in names.items():
        chosen = [line for line in lines if line["side"] == side and line["group"] in of_side]
        entry = {"name": "all", "side": side, "groups": of_side, "n": len(chosen), **figures_of(chosen, side)}
        pooled[side] = entry if chosen else None
    return pooled


def figures_of(lines: list[dict], side: str) -> dict:
    """Return every measure's figure over some lines of one side: by model, and what both models have together."""
    labels = [label for label in MODELS if lines and label in lines[0]]
    found: dict[str, dict] = {label: {} for label in (*labels, "change", "ratio", "pair")}
    for measure in ANSWER_MEASURES:
        if side not in measure.better:
            continue
        values = {label: [line[label][measure.name] for line in lines] for label in labels}
        for label, of_label in values.items():
            found[label][measure.name] = aggregate(measure, of_label)
        if measure.changes and lines:
            pairs = [(x, y) for x, y in zip(values["before"], values["after"], strict=True)
                     if x is not None and y is not None]  # fmt: skip
            found["change"][measure.name] = mean([float(y) - float(x) for x, y in pairs])
            if measure.is_rate:
                found["ratio"][measure.name] = paired_ratio([x for x, _ in pairs], [y for _, y in pairs])
    for measure in PAIR_MEASURES:
        if side in measure.better:
            found["pair"][measure.name] = aggregate(measure, [measure.of_line(line) for line in lines])
    return found


def aggregate(measure: Measure, values: list) -> Estimate:
    """Return a figure of the values that there are."""
    return measure.aggregate([value for value in values if value is not None])


def paper_columns(lines: list[dict], entry: dict, judges: list[dict]) -> dict:
    """Return the columns of Yao et al. 2023 of one group, by model. judges: the judge models, as reported."""
    columns = {}
    for label in (label for label in MODELS if label in entry):
        columns[label] = {name: entry[label][name] for name in ("diversity", "fluency", "utility")}
        columns[label]["harmful"] = {judge["name"]: flagged(lines, label, judge) for judge in judges}
    return columns


def flagged(lines: list[dict], label: str, judge: dict) -> Estimate:
    """Return the share of one model's answers that a judge model flags, of those that it can tell of."""
    told = [line[label]["labels"].get(judge["name"]) for line in lines]
    return rate([name in judge["given"] for name in told if name not in (None, *judge["uncounted"])])


def group_facts(lines: list[dict], inputs: EvaluationInputs) -> list[dict]:
    """Return what is known of every group but its figures, from inputs and from the first of its lines."""
    first = {line["group"]: line for line in reversed(lines)}
    return [{"name": group.name, "source": group.source, "split": group.split, "side": group.side,
             "style": group.style, "counts": group.counts, "text": group.is_text, "judge": group.judge,
             "language": first[group.name]["language"], "judged": first[group.name]["judged"]}
            for group in inputs.groups]  # fmt: skip


def make_report(inputs: EvaluationInputs, records: dict[str, Record], scores: Scores, options) -> dict:
    """Return report.json as far as attacks, harness, verdict and times do not go into it."""
    lines, judges = scores.lines, [dict(judge) for judge in scores.judges]
    facts = group_facts(lines, inputs)
    entries = group_entries(lines, facts)
    for entry in entries:
        of_group = [line for line in lines if line["group"] == entry["name"]]
        entry["paper"] = paper_columns(of_group, entry, [judge for judge in judges if judge["kind"] in MODEL_KINDS])
    for judge in judges:
        judge["decides"] = [f"{e['side']}: {e['name']}" for e in entries if e["judge"] == judge["name"]]
    told = (inputs.groups, {label: record.scores for label, record in records.items()}, inputs.holdout,
            {label: record.holdout for label, record in records.items()})  # fmt: skip
    pooled = pooled_entries(lines, facts)
    for name, left in extraction_report(*told).items():
        entry = pooled["forget"] if name == "all" else next(entry for entry in entries if entry["name"] == name)
        entry["pair"]["extraction_left"] = left.left
        entry["extraction"] = left
    report = {
        "schema": SCHEMA, "inputs": inputs.hash(),
        **{label: inputs.models.get(label) for label in MODELS},
        "weights": {label: record.weights for label, record in records.items()},
        "options": dataclasses.asdict(options), "judges": judges,
        "on_topic_cosine": next(judge["on_topic_cosine"] for judge in judges if judge["name"] == OUTCOME),
        "groups": entries, "pooled": pooled,
        "membership": membership_report(*told, inputs.members),
        "forget_quality": forget_quality_report(*told[:2], inputs.members),
        "given_text": compare_text_scores({label: record.text_scores for label, record in records.items()}),
    }  # fmt: skip
    return as_plain(report)


def as_plain(value):
    """Return a copy in which every result class is a dict, and every number finite or None, as JSON has them."""
    if dataclasses.is_dataclass(value):
        return as_plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: as_plain(content) for key, content in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return [as_plain(content) for content in value] if isinstance(value, list | tuple) else value
