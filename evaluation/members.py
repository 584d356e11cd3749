"""Which forget rows count as members: those that a run trained on."""

from __future__ import annotations

import dataclasses

from data_module import Sides, split_sources
from engine.paths import read_args
from engine.trained_on import TrainedOn
from evaluation.groups import LISTED, TRAINED, Group
from prompts.formatter import PromptFormatter
from prompts.windows import Passage, TextCutter
from sources.rows import Row

MEMBER_SPLITS = (TRAINED, LISTED, "train", "")  # "": all rows of a source were asked
SPLIT_OPTIONS = ("seed", "dev_share", "test_share", "text_window", "text_stride")  # what a split of the rows depends on

Spans = dict[tuple[str, str], list[tuple[int, int]]]  # (source, document) -> stretches of its tokens


@dataclasses.dataclass(frozen=True)
class Members:
    """The members among the forget rows that are asked.

    trained_on: the record of the unlearned model, if it has one. never_trained: `Row.key` of rows that are no members,
    whatever their split says (those of --unseen_data). trained_text: what a run trained on of each document; a passage
    of other windows than the run's is a member if all of it lies there.
    """

    trained_on: TrainedOn | None = None
    never_trained: frozenset[str] = frozenset()
    trained_text: Spans = dataclasses.field(default_factory=dict)

    def holds(self, row: Row) -> bool:
        """Return whether a row is a member; without a record, every row that may be one is."""
        if row.key in self.never_trained:
            return False
        if self.trained_on is None or self.trained_on.holds("forget", row.key):
            return True
        spans = self.trained_text.get((row.source, row.document), ())
        return isinstance(row, Passage) and any(start <= row.start and row.end <= end for start, end in spans)

    def places(self, groups: list[Group]) -> dict[str, list[tuple[int, int]]]:
        """Return {forget source: places (group, row) of its members}."""
        found: dict[str, list[tuple[int, int]]] = {}
        for i, group in enumerate(groups):
            if group.side == "forget" and group.counts and group.split in MEMBER_SPLITS:
                members = [(i, j) for j, row in enumerate(group.rows) if self.holds(row)]
                if members:
                    found.setdefault(group.source, []).extend(members)
        return found


def read_members(options, sides: Sides, formatter: PromptFormatter, trained_on: TrainedOn | None) -> Members:
    """Return the members of an evaluation. formatter: of the original."""
    never_trained = frozenset(row.key for row in sides.rows("unseen"))
    made = read_args(options.model_name)
    if trained_on is None or made is None or not any(row.is_text for row in sides.rows("forget")):
        return Members(trained_on, never_trained)
    of_run = {name: made["options"][name] for name in SPLIT_OPTIONS if name in made["options"]}
    return Members(trained_on, never_trained, trained_spans(sides, dataclasses.replace(options, **of_run), formatter,
                                                            trained_on))  # fmt: skip


def trained_spans(sides: Sides, options, formatter: PromptFormatter, trained_on: TrainedOn) -> Spans:
    """Return the stretches of each forget document that lie in passages on the record. options: those of the run."""
    spans: Spans = {}
    cutter = TextCutter.of(formatter, options)
    for parts in split_sources([source.rows for source in sides.forget], "forget", options, cutter):
        for passage in (row for rows in parts.values() for row in rows if isinstance(row, Passage)):
            if trained_on.holds("forget", passage.key):
                spans.setdefault((passage.source, passage.document), []).append((passage.start, passage.end))
    return {document: merged(of_document) for document, of_document in spans.items()}


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans of which those that overlap or touch are one."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found
