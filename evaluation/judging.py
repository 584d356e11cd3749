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
from evaluation.judges.panel import OUTCOME, REFERENCE, Panel
from evaluation.measures import ANSWER_MEASURES, Answer
from evaluation.metrics.texts import on_topic
from evaluation.paper import OwnScores
from evaluation.stages import Record, code_hash, key_of, may_reuse, read_keyed, write_keyed
from utils import log

DECIMALS = 6
HERE = Path(__file__).parent
JUDGING_CODE = (
    HERE / "judges",
    HERE / "metrics",
    HERE / "measures.py",
    HERE / "judging.py",
)  # a change of it judges anew


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
    said_of = [[[o and dataclasses.asdict(o) for o in group] for group in of_model] for of_model in own.values()]
    key = key_of("scores", said, said_of, list(map(repr, inputs.groups)), panel.identity(), code_hash(*JUDGING_CODE))
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
    languages = [language_of([row.prompt for row in group.rows]) for group in inputs.groups]
    warn_of_unread(inputs.groups, languages, panel)
    answers = {label: judged_answers(inputs.groups, languages, record, own[label], panel)
               for label, record in records.items()}  # fmt: skip
    lines = []
    for i, group in enumerate(inputs.groups):
        lines += group_lines(group, languages[i], {label: of_model[i] for label, of_model in answers.items()}, panel)
    return lines


def warn_of_unread(groups: list[Group], languages: list[str | None], panel: Panel) -> None:
    """Name the groups whose deciding judge does not read their language."""
    for group, language in zip(groups, languages, strict=True):
        if not panel.loaded.by_name[group.judge].reads(language):
            or_judge = ", or a --judge_model that reads it with --judge" if group.side == "forget" else ""
            log.warning("%s: not judged: the judge %s does not read its language (%s); name a multilingual "
                        "--embedder%s", group.name, group.judge, language, or_judge)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class JudgedAnswer:
    """An answer, and what every judge calls it, by the judge's name."""

    answer: Answer
    labels: dict[str, str]


def judged_answers(
    groups: list[Group], languages: list[str | None], record: Record, own: list[list[OwnScores | None]], panel: Panel
) -> list[list[JudgedAnswer]]:
    """Return one model's answers, a list a group, each with what every judge says that reads the group's language.

    A judge is asked about all answers at once: a judge model is loaded for that, and then let go.
    """
    places = [(i, n) for i, group in enumerate(groups) for n in range(len(group.rows))]
    told: dict[tuple[int, int], dict[str, Judgement]] = {place: {} for place in places}
    for name, judge in panel.loaded.by_name.items():
        read = [(i, n) for i, n in places
                if judge.reads(languages[i]) and (name != REFERENCE or groups[i].judge == REFERENCE)]  # fmt: skip
        asked = [(groups[i].rows[n], record.answers[i][n]) for i, n in read]
        for place, judgement in zip(read, panel.judge(name, asked) if asked else [], strict=True):
            told[place][name] = judgement
    rewards = dict.fromkeys(places)
    if model := panel.loaded.rewards:
        prompts, texts = zip(*((groups[i].rows[n].prompt, record.answers[i][n]) for i, n in places), strict=True)
        rewards = dict(zip(places, model.reward(list(prompts), list(texts)), strict=True))
        model.release()
    found: list[list[JudgedAnswer]] = [[] for _ in groups]
    bound = panel.loaded.embed.on_topic_cosine
    for i, n in places:
        decided, outcome = told[i, n].get(groups[i].judge), told[i, n].get(OUTCOME)
        cosine = outcome.score if outcome and not groups[i].is_text else None
        answer = Answer(
            row=groups[i].rows[n], text=record.answers[i][n], decided=decided,
            given=panel.gives(groups[i].judge, decided),
            cosine=cosine, is_about=None if cosine is None else on_topic(cosine, record.answers[i][n], bound),
            scores=record.scores[i][n], own=own[i][n], reward=rewards[i, n],
        )  # fmt: skip
        found[i].append(JudgedAnswer(answer, {name: judgement.label for name, judgement in told[i, n].items()}))
    return found


def group_lines(group: Group, language: str | None, answers: dict[str, list[JudgedAnswer]], panel: Panel) -> list[dict]:
    """Return a group's lines from every model's answers, by label, in the order of its rows."""
    is_judged = panel.loaded.by_name[group.judge].reads(language)
    texts = {label: [judged.answer.text for judged in answers[label]] for label in ("before", "after")}
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
            answer = of_model[n].answer
            line[label] = {"answer": answer.text, "label": answer.decided and answer.decided.label,
                           "labels": of_model[n].labels, "cosine": rounded(answer.cosine)}  # fmt: skip
            line[label] |= {m.name: rounded(m.value(group.side, answer)) for m in ANSWER_MEASURES}
        line["similarity"] = rounded(similarity[n]) if embeds else None
        lines.append(line)
    return lines


def rounded(value):
    """Return a value as it stands in scores.jsonl."""
    if isinstance(value, tuple):
        return [rounded(part) for part in value]
    return round(value, DECIMALS) if isinstance(value, float) else value
