"""What the original is asked about the forget rows before a run: whether it gives their answers, how it says that it
does not know, and what it says about names that nobody knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from engine.generation import generate_missing_responses
from evaluation.judges.reference import ReferenceJudge, reference_of
from evaluation.judges.refusals import is_refusal
from run.alternatives import with_alternatives
from sources.rows import Row
from utils import UsageError, log

NOT_KNOWN = 'Somebody asks: "{}" You do not know the answer. Tell them in one short sentence that you do not know it.'
SHORTEST_NOT_KNOWN = "I don't know."

Ask = Callable[[list[Row], float], list[Row]]  # (rows, temperature) -> the rows with what the original says


def ask_about_forget_rows(setup, bar) -> None:
    """Ask the original what the draws need to know of the forget rows. bar: (chunks, label) -> a progress bar.

    setup: a Setup with its model loaded; its sampler's forget rows are replaced. Raises UsageError.
    """
    sampler, options = setup.sampler, setup.options
    if any(draw.only_given for draw in sampler.draws) and options.dry_run:
        log.info("only rows whose answer the model gives will train; a dry run does not ask it, so all are counted")
    elif draws := [draw for draw in sampler.draws if draw.only_given]:
        _change_rows(sampler, draws, lambda rows: only_given(rows, _ask(setup, bar, "listed answers")))
    if draws := [draw for draw in sampler.draws if draw.own_words]:
        _change_rows(sampler, draws, lambda rows: with_own_words(rows, _ask(setup, bar, "own words")))
    others = [row for source in sampler.rows["normal"] for row in source]
    ask = _ask(setup, bar, "other answers")
    asking = {draw.kinds: draw for draw in reversed(sampler.draws) if draw.alternatives}  # the first draw of each kinds
    for draw in asking.values():
        _change_rows(sampler, [draw], lambda rows, draw=draw: with_alternatives(
            rows, others, draw.alternatives, options.seed, lambda asked: ask(asked, draw.temperature),
            required=draw.kinds is None,
        ))  # fmt: skip


def _change_rows(sampler, draws: list, change: Callable[[list[Row]], list[Row]]) -> None:
    """Replace the forget rows that one of the draws takes by what `change` makes of them, in their order; it may leave
    some out. A source that has none left is left out."""
    sources = sampler.rows["forget"]
    places = [(i, j) for i, rows in enumerate(sources) for j, row in enumerate(rows)
              if any(draw.is_of_kind(row) for draw in draws)]  # fmt: skip
    if not places:
        return
    marked = [dataclasses.replace(sources[i][j], source=f"{i} {j} {sources[i][j].source}") for i, j in places]
    changed, asked = {}, set(places)
    for row in change(marked):
        i, j, source = row.source.split(" ", 2)
        changed[int(i), int(j)] = dataclasses.replace(row, source=source)
    sampler.rows["forget"] = [kept for i, rows in enumerate(sources) if (kept := [
        changed.get((i, j), row) for j, row in enumerate(rows) if (i, j) in changed or (i, j) not in asked
    ])]  # fmt: skip


def _ask(setup, bar, label: str) -> Ask:
    """Return a function that asks the original; in a dry run, which needs lengths alone, it is not asked."""
    options = setup.options

    def ask(rows: list[Row], temperature: float) -> list[Row]:
        if options.dry_run:  # the whole prompt: an answer that lacks its invented name counts as misspelt
            return [dataclasses.replace(row, response=f"another answer {row.prompt}") for row in rows]
        answered = generate_missing_responses(
            rows, setup.answer_model.generator, setup.formatter, fingerprint=setup.metadata.base_model,
            tokens=options.max_answer_tokens, temperature=temperature, seed=options.seed,
            batch_size=setup.recipe.own_answers.batch_size,
            cache_dir=None if options.cache_dir == "none" else options.cache_dir,
            progress=lambda chunks: bar(chunks, label),
        )  # fmt: skip
        setup.metadata.add_answers(answered)
        return answered

    return ask


def only_given(rows: list[Row], ask: Ask) -> list[Row]:
    """Return the rows whose answer the original gives, greedily, by the judge of references; the log says how many.

    Rows without an answer and passages stay. Raises UsageError if it gives none.
    """
    judged = [i for i, row in enumerate(rows) if row.response and not row.is_text]
    said = ask([dataclasses.replace(rows[i], response=None) for i in judged], 0.0)
    answers, judge = [row.response or "" for row in said], ReferenceJudge(is_refusal)
    labels = judge.judge([""] * len(judged), answers, [reference_of(rows[i]) for i in judged])
    missing = {i for i, judgement in zip(judged, labels, strict=True) if judgement.label not in judge.given}
    if missing:
        log.warning("%d of %d forget rows are left out: asked for them, the model does not give the listed answer "
                    "(of all forget rows, in their order: %s)", len(missing), len(rows),
                    ", ".join(str(i + 1) for i in sorted(missing)))  # fmt: skip
    if len(missing) == len(rows):
        raise UsageError(f"the model gives none of the {len(rows)} listed answers, so there is nothing to put right: "
                         "list answers that it gives, in its own words")  # fmt: skip
    return [row for i, row in enumerate(rows) if i not in missing]


def with_own_words(rows: list[Row], ask: Ask) -> list[Row]:
    """Return the rows; one without a wanted answer gets what the original says when it is told that it does not know.

    What it says must be a refusal and not repeat the row's answer; else it is the shortest one that was, or
    SHORTEST_NOT_KNOWN. The log says how many.
    """
    places = [i for i, row in enumerate(rows) if not row.wanted and not row.is_text]
    if not places:
        return rows
    said = ask([dataclasses.replace(rows[i], prompt=NOT_KNOWN.format(rows[i].prompt), response=None)
                for i in places], 0.0)  # fmt: skip
    answers = [row.response.strip() if row.complete and row.response else "" for row in said]
    judged = ReferenceJudge(is_refusal).judge([""] * len(places), answers, [reference_of(rows[i]) for i in places])
    refusals = [text for text, judgement in zip(answers, judged, strict=True) if judgement.label == "refused"]
    instead = min(refusals, key=len, default=SHORTEST_NOT_KNOWN)
    log.info("%d forget rows have no wanted answer: they get the model's own words for not knowing (%d of them those "
             "of another row)", len(places), len(places) - len(refusals))  # fmt: skip
    words = {i: text if judgement.label == "refused" else instead
             for i, text, judgement in zip(places, answers, judged, strict=True)}  # fmt: skip
    return [dataclasses.replace(row, wanted=words.get(i, row.wanted)) for i, row in enumerate(rows)]
