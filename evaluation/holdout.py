"""Rows that no model of an evaluation ever saw: read, checked against all that was trained on, drawn."""

from __future__ import annotations

from data_module import Sides, sample
from engine.trained_on import TrainedOn
from evaluation.groups import free_name
from prompts.windows import TextCutter
from sources.rows import Row, Source, read_sources, read_texts
from utils import UsageError, log

FEW = 10  # rows


def read_holdout(options, sides: Sides, cutter: TextCutter, trained_on: TrainedOn | None) -> dict[str, list[Row]]:
    """Return {source: its rows} of --holdout_data and --holdout_text (of text, passages), at most --prompts_per_group
    of each. trained_on: the record of the unlearned model, if it has one.

    Raises UsageError, with source and row, for a row without an answer, for a row that is forgotten, retained or on the
    record of a run, and for a kind of rows with which no forget row can be compared.
    """
    forget = sides.rows("forget")
    answered = any(row.response and not row.is_text for row in forget)
    holdout: dict[str, list[Row]] = {}
    for source in read_sources(options.holdout_data, "--holdout_data", fields=options.fields):
        place = f"--holdout_data {source.spec}"
        if not answered:
            raise UsageError(f"{place}: no forget row came with an answer, so there is nothing to compare with; leave "
                             "the option out, or give text as --holdout_text")  # fmt: skip
        for number, row in enumerate(source.rows, 1):
            if not row.response:
                raise UsageError(f"{place}, row {number}: has no answer ({row.prompt[:60]!r}); holdout rows are "
                                 "scored by their answers")  # fmt: skip
        refuse_seen(source, place, sides, trained_on)
        _add(holdout, source, source.rows, options)
    for source in read_texts(options.holdout_text, "--holdout_text", options.fields):
        place = f"--holdout_text {source.spec}"
        if not any(row.is_text for row in forget):
            raise UsageError(f"{place}: --forget_text is not given, so there is no text to compare with; leave the "
                             "option out, or give rows with answers as --holdout_data")  # fmt: skip
        passages = [passage for document in source.rows for passage in cutter.cut(document)]
        if not passages:
            raise UsageError(f"{place}: holds too few tokens to score")
        refuse_seen_text(passages, place, sides, trained_on)
        _add(holdout, source, passages, options)
    return holdout


def _add(holdout: dict[str, list[Row]], source: Source, rows: list[Row], options) -> None:
    """Add the rows of a source that are scored, and say how many are not."""
    drawn = sample(rows, options.prompts_per_group, options.seed)
    if len(drawn) < len(rows):
        log.info("holdout %s: %d of its %d rows are scored, one a prompt and at most --prompts_per_group",
                 source.spec, len(drawn), len(rows))  # fmt: skip
    if len(drawn) < FEW:
        log.warning("holdout %s: has only %d rows to score; membership says next to nothing of fewer than %d",
                    source.spec, len(drawn), FEW)  # fmt: skip
    holdout[free_name(source.spec, set(holdout))] = drawn


def refuse_seen(source: Source, place: str, sides: Sides, trained_on: TrainedOn | None) -> None:
    """Raise UsageError if a row of a source is forgotten, retained or on the record of a run."""
    seen = {side: {_plain(row.key) for row in sides.rows(side) if not row.is_text} for side in ("forget", "normal")}
    for number, row in enumerate(source.rows, 1):
        for side, prompts in seen.items():
            if _plain(row.key) in prompts:
                raise UsageError(f"{place}, row {number}: is in --{side}_data too ({row.prompt[:60]!r}); only rows "
                                 "that no model saw can be compared with trained ones")  # fmt: skip
        _refuse_recorded(row, f"{place}, row {number}", row.prompt, trained_on)


def refuse_seen_text(passages: list[Row], place: str, sides: Sides, trained_on: TrainedOn | None) -> None:
    """Raise UsageError if a passage stands in a document that a model saw."""
    documents = [(side, _plain(row.response or "")) for side in ("forget", "normal") for row in sides.rows(side)
                 if row.is_text]  # fmt: skip
    for passage in passages:
        text = _plain(passage.key)
        for side, document in documents:
            if text and text in document:
                raise UsageError(f"{place}: its document {passage.document} has text that is in --{side}_text too "
                                 f"({passage.key[:60]!r}); only text that no model saw can be compared")  # fmt: skip
        _refuse_recorded(passage, f"{place}, document {passage.document}", passage.key, trained_on)


def _refuse_recorded(row: Row, place: str, text: str, trained_on: TrainedOn | None) -> None:
    if trained_on and trained_on.knows(row.key):
        raise UsageError(f"{place}: an earlier run trained on it ({text[:60]!r}); only rows that no model saw can be "
                         "compared with trained ones")  # fmt: skip


def _plain(text: str) -> str:
    """Return a text without case and spacing."""
    return " ".join(text.casefold().split())
