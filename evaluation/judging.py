"""Stage 2: what the judges and the measures say of every answer, a line of scores.jsonl a prompt."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from engine.processes import join_processes
from evaluation.groups import Group
from evaluation.inputs import EvaluationInputs
from evaluation.judges.base import Judgement
from evaluation.judges.languages import language_of
from evaluation.judges.panel import OUTCOME, Panel
from evaluation.measures import ANSWER_MEASURES, Answer
from evaluation.paper import OwnScores
from evaluation.stages import Record, code_hash, key_of, may_reuse, read_keyed, write_keyed
from utils import log

DECIMALS = 6
HERE = Path(__file__).parent
CODE = (HERE / "judges", HERE / "metrics", HERE / "measures.py", HERE / "judging.py")  # a change of it judges anew


@dataclasses.dataclass(frozen=True)
class Scores:
    """The lines of scores.jsonl, and what each judge is: its name, kind, limits and the hash of its weights."""

    lines: list[dict]
    judges: list[dict]


def score_answers(
    inputs: EvaluationInputs, records: dict[str, Record], own: dict[str, list[list[OwnScores | None]]], panel: Panel,
    folder: Path, options,
) -> Scores:  # fmt: skip
    """Return the scores of all answers: those in `folder` if they are of the same answers and judges."""
    said = [(record.answers, [[s and dataclasses.asdict(s) for s in group] for group in record.scores])
            for record in records.values()]  # fmt: skip
    asked = [(group.name, group.judge, repr(group.rows)) for group in inputs.groups]
    key = key_of("scores", said, asked, panel.identity(), code_hash(*CODE))
    path = folder / "scores.jsonl"
    if may_reuse(options) and (kept := read_keyed(path, key)):
        log.info("scores: as they stand in %s", path)
        return Scores(*kept)
    scores = Scores(score_lines(inputs, records, own, panel), panel.describe())
    if join_processes().is_main_process:
        write_keyed(path, scores.lines, key, scores.judges)
    return scores


def score_lines(
    inputs: EvaluationInputs, records: dict[str, Record], own: dict[str, list[list[OwnScores | None]]], panel: Panel
) -> list[dict]:
    """Return the lines of all groups. records, own: what each model said, and what the original says of that."""
    lines = []
    for i, group in enumerate(inputs.groups):
        lines += group_lines(group, {label: answers_of(i, group, record, own[label], panel)
                                     for label, record in records.items()}, panel)  # fmt: skip
    return lines


def answers_of(
    place: int, group: Group, record: Record, own: list[list[OwnScores | None]], panel: Panel
) -> list[tuple[Answer, dict[str, str]]]:
    """Return one model's answers to a group, each with what every judge calls it. place: the group's in the record."""
    texts, judges = record.answers[place], panel.loaded
    judged = judgements(group, texts, panel)
    prompts = [row.prompt for row in group.rows]
    rewards = judges.reward(prompts, texts) if judges.reward else [None] * len(texts)
    found = []
    for n, row in enumerate(group.rows):
        by_judge = {name: of_judge[n] for name, of_judge in judged.items()}
        decided, outcome = by_judge.get(group.judge), by_judge.get(OUTCOME)
        answer = Answer(
            row=row, text=texts[n], decided=decided, given=panel.gives(group.judge, decided),
            cosine=outcome.score if outcome and not group.is_text else None, scores=record.scores[place][n],
            own=own[place][n], reward=rewards[n],
        )  # fmt: skip
        found.append((answer, {name: judgement.label for name, judgement in by_judge.items()}))
    return found


def judgements(group: Group, texts: list[str], panel: Panel) -> dict[str, list[Judgement]]:
    """Return what each judge that reads the group's language says of some answers to it."""
    language = group_language(group)
    prompts, references = [row.prompt for row in group.rows], [row.response for row in group.rows]
    names = [name for name, judge in panel.loaded.by_name.items()
             if name in (group.judge, OUTCOME, *panel.names()) and judge.reads(language)]  # fmt: skip
    return {name: panel.judge(name, prompts, texts, references) for name in names}


def group_language(group: Group) -> str | None:
    """Return the language of a group's prompts together, None if it cannot be told."""
    return language_of([row.prompt for row in group.rows])


def group_lines(group: Group, answers: dict[str, list[tuple[Answer, dict[str, str]]]], panel: Panel) -> list[dict]:
    """Return a group's lines from every model's answers, by label, in the order of its rows."""
    language = group_language(group)
    is_judged = panel.loaded.by_name[group.judge].reads(language)
    if not is_judged:
        log.warning("%s: not judged: the judge %s does not read its language (%s); name a multilingual --embedder, or "
                    "a --judge_model that reads it with --judge", group.name, group.judge, language)  # fmt: skip
    texts = {label: [answer.text for answer, _ in answers[label]] for label in ("before", "after")}
    vectors = {label: panel.loaded.embed(of_model) for label, of_model in texts.items()}  # (n, d) each
    similarity = (vectors["before"] * vectors["after"]).sum(-1).tolist()  # (n,)
    embeds = panel.loaded.by_name[OUTCOME].reads(language)
    lines = []
    for n, row in enumerate(group.rows):
        line = {"id": row.id or hashlib.sha256(row.key.encode()).hexdigest()[:12], "group": group.name,
                "side": group.side, "counts": group.counts, "style": group.style, "text": group.is_text,
                "judge": group.judge, "judged": is_judged, "language": language, "prompt": row.prompt,
                "reference": row.response}  # fmt: skip
        if row.earlier:
            line["earlier"] = row.earlier
        for label, of_model in answers.items():
            answer, labels = of_model[n]
            line[label] = {"answer": answer.text, "label": answer.decided and answer.decided.label, "labels": labels,
                           "cosine": rounded(answer.cosine)}  # fmt: skip
            line[label] |= {m.name: rounded(m.value(group.side, answer)) for m in ANSWER_MEASURES}
        line["similarity"] = rounded(similarity[n]) if embeds else None
        lines.append(line)
    return lines


def rounded(value):
    """Return a value as it stands in scores.jsonl."""
    if isinstance(value, tuple):
        return [rounded(part) for part in value]
    return round(value, DECIMALS) if isinstance(value, float) else value
