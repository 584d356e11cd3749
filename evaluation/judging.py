"""Judge the answers of both models, group by group: the figures of report.json and the lines of answers.jsonl."""

from __future__ import annotations

import dataclasses

from evaluation.groups import Group
from evaluation.inputs import EvaluationInputs
from evaluation.measures import MEASURES, Answer, AnswerPair
from evaluation.metrics.texts import ON_TOPIC_COSINE
from evaluation.model_run import ModelRun, compare_text_scores
from evaluation.scoring import memorization_metrics, yao2023_metrics

SCHEMA = 4  # of report.json


def judge_answers(inputs: EvaluationInputs, runs: dict[str, ModelRun], embed, options) -> tuple[dict, list[dict]]:
    """Return report.json as far as attacks and verdict do not go into it, and the lines of answers.jsonl."""
    groups, lines = judge_groups(inputs, runs, embed, options)
    report = {
        "schema": SCHEMA,
        "inputs": inputs.hash(),
        "before": options.original_name,
        "after": options.model_name,
        "fingerprints": {label: run.fingerprint for label, run in runs.items() if run.fingerprint},
        "options": dataclasses.asdict(options),
        "on_topic_cosine": ON_TOPIC_COSINE,
        "judges": inputs.judges,
        "groups": groups,
        "given_text": compare_text_scores(runs["before"].text_scores, runs["after"].text_scores),
        "memorised": memorization_metrics({label: run.forget_scores for label, run in runs.items()}),
    }
    return as_plain(report), lines


def as_plain(value):
    """Return a copy in which every result class is a dict, as in report.json."""
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: as_plain(content) for key, content in value.items()}
    return [as_plain(content) for content in value] if isinstance(value, list) else value


def judge_groups(inputs: EvaluationInputs, runs: dict[str, ModelRun], embed, options) -> tuple[list[dict], list[dict]]:
    """Return the figures of every group, under report.json's keys, and one line per prompt, as in answers.jsonl."""
    before, after = runs["before"], runs["after"]
    answers = {"before": before.answers, "after": after.answers}
    columns = yao2023_metrics(inputs.groups, answers, before.answer_model, before.formatter, options)
    all_figures, all_lines = [], []
    for i, group in enumerate(inputs.groups):
        figures, lines = judge_group(group, before.answers[i], after.answers[i], embed)
        figures["paper"] = columns[i]
        all_figures.append(figures)
        all_lines += lines
    return all_figures, all_lines


def judge_group(group: Group, before: list[str], after: list[str], embed) -> tuple[dict, list[dict]]:
    """Return one group's figures and lines: every measure of `evaluation.measures`, of both models' answers."""
    pairs = pair_answers(group, before, after, embed)
    is_text = {"text": True} if group.is_text else {}
    lines = [{"group": group.name, "side": group.side, "counts": group.counts, "style": group.style, **is_text,
              "prompt": row.prompt, "before": {"answer": pair.before.text}, "after": {"answer": pair.after.text}}
             for row, pair in zip(group.rows, pairs, strict=True)]  # fmt: skip
    for row, line in zip(group.rows, lines, strict=True):
        if row.earlier:
            line["earlier"] = row.earlier
    figures = {"name": group.name, "side": group.side, "style": group.style, "n": len(lines), "counts": group.counts,
               **is_text}  # fmt: skip
    for measure in MEASURES:
        section = figures.setdefault(measure.section, {}) if measure.section else figures
        for label, values in measure.values(group.side, pairs).items():
            if measure.in_lines:
                for line, value in zip(lines, values, strict=True):
                    (line[label] if label else line)[measure.name] = measure.line_value(value)
            if measure.aggregate:
                (section.setdefault(label, {}) if label else section)[measure.name] = measure.figure(values)
    return figures, lines


def pair_answers(group: Group, before: list[str], after: list[str], embed) -> list[AnswerPair]:
    """Return both models' answers to every prompt of a group, with their embeddings' cosines."""
    prompt_vectors = embed([row.prompt for row in group.rows])  # (n, d)
    vectors = {"before": embed(before), "after": embed(after)}  # (n, d) each
    similarity = (vectors["before"] * vectors["after"]).sum(-1).tolist()  # (n,)
    texts, pairs = {"before": before, "after": after}, []
    for i, row in enumerate(group.rows):
        answers = {label: Answer(row, texts[label][i], float((vectors[label][i] * prompt_vectors[i]).sum()))
                   for label in texts}  # fmt: skip
        pairs.append(AnswerPair(**answers, similarity=similarity[i]))
    return pairs
