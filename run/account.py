"""The account of the rows: of each source, how many rows train, are held out, are cut, and what of them is not used."""

from __future__ import annotations

import collections
import dataclasses

from data_module import Sides
from prompts.formatter import PromptFormatter
from sources.rows import Row, Source

CATEGORIES_SHOWN = 8


@dataclasses.dataclass
class SourceAccount:
    """What became of the rows of one source.

    `with_answer`, `without_answer`: rows that came with an answer, and rows that the original answers itself.
    `answers_cut`, `prompts_cut`: rows whose answer or prompt is longer than its limit in tokens (`answer_tokens`,
    `prompt_tokens`). `duplicates`: rows whose prompt and answer are those of an earlier row of the source. `wanted`:
    rows with a wanted answer. `train`, `dev`, `test`: rows of each split; `categories`: category -> its rows.
    `unused_fields`: fields that look like an answer and are not used -> their rows. `documents`: of a text, whose rows
    are passages. `cut_is_estimate`: what is cut was counted on a sample.
    """

    side: str
    source: str
    rows: int
    with_answer: int
    without_answer: int
    answers_cut: int
    answer_tokens: int
    prompts_cut: int
    prompt_tokens: int
    duplicates: int
    wanted: int
    train: int
    dev: int
    test: int
    categories: dict[str, int]
    unused_fields: dict[str, int]
    notes: list[str]
    documents: int = 0
    cut_is_estimate: bool = False

    @classmethod
    def of(
        cls, side: str, source: Source, splits: dict[str, list[Row]], formatter: PromptFormatter, answer_tokens: int
    ) -> SourceAccount:
        """Count the rows of a source, whose answers have at most `answer_tokens` tokens; of a text, its passages."""
        is_text = bool(source.rows) and source.rows[0].is_text
        rows = [row for part in splits.values() for row in part] if is_text else source.rows
        answered = sum(row.response is not None for row in rows)
        cut = formatter.count_cut([] if is_text else rows, answer_tokens)
        categories = collections.Counter(name.strip() for row in rows if row.category
                                         for name in row.category.split(";"))  # fmt: skip
        return cls(
            side, source.spec, len(rows), answered, len(rows) - answered, cut.answers, answer_tokens, cut.prompts,
            formatter.max_prompt_tokens, len(rows) - len({(row.key, row.response) for row in rows}),
            sum(row.wanted is not None for row in rows), len(splits["train"]), len(splits["dev"]), len(splits["test"]),
            dict(categories.most_common()), dict(source.unused_fields), list(source.notes),
            len(source.rows) if is_text else 0, cut.is_estimate,
        )  # fmt: skip

    def lines(self) -> list[str]:
        """Return the account in words: one line, then one for each field that is not used and each note."""
        about = "about " if self.cut_is_estimate else ""
        answers = (f"{self.with_answer} with an answer, {self.without_answer} without, "
                   f"{about}{self.answers_cut} answers cut at {self.answer_tokens} tokens")  # fmt: skip
        texts = f"{self.rows} passages of {self.documents} documents"
        parts = [
            texts if self.documents else f"rows: {answers}",
            f"{about}{self.prompts_cut} prompts cut at {self.prompt_tokens} tokens" if self.prompts_cut else "",
            f"{self.duplicates} duplicates" if self.duplicates else "",
            f"{self.wanted} with a wanted answer" if self.wanted else "",
            f"{self.train} train, {self.dev + self.test} held out ({self.dev} for the looks, {self.test} for the "
            "evaluation)",
        ]
        shown = [f"{name} {count}" for name, count in list(self.categories.items())[:CATEGORIES_SHOWN]]
        if more := len(self.categories) - CATEGORIES_SHOWN:
            shown += [f"{more} more"] if more > 0 else []
        parts.append(f"categories: {', '.join(shown)}" if shown else "")
        where = f"{self.side} {self.source}"
        unused = [f"{where}: field '{field}' looks like an answer and is not used ({count} rows)"
                  for field, count in self.unused_fields.items()]  # fmt: skip
        return [f"{where}: " + "; ".join(filter(None, parts)), *unused, *(f"{where}: {note}" for note in self.notes)]


def make_account(
    sides: Sides, splits: dict, formatter: PromptFormatter, answer_tokens: dict[str, int]
) -> list[SourceAccount]:
    """Return the account of every source. splits: as `split_sides` gives them; answer_tokens: the limit of a side's
    answers."""
    limits = answer_tokens | {"unseen": answer_tokens["forget"]}
    return [
        SourceAccount.of(side, source, parts, formatter, limits[side])
        for side, of_side in splits.items()
        for source, parts in zip(getattr(sides, side), of_side, strict=True)
    ]


def account_lines(account: list[SourceAccount]) -> list[str]:
    """Return the account in words; a source that is listed several times stands there once, with the count."""
    counts = collections.Counter("\n".join(source.lines()) for source in account)
    return [line + (f" (listed {count} times)" if i == 0 and count > 1 else "")
            for text, count in counts.items() for i, line in enumerate(text.split("\n"))]  # fmt: skip


def held_out_line(splits: dict[str, list[dict[str, list[Row]]]]) -> str:
    """Return the line on which forget rows train, the first one of a run's log."""
    if not splits["forget"]:
        return "nothing is forgotten: the rows are learned"
    counts = {name: sum(len(parts[name]) for parts in splits["forget"]) for name in ("train", "dev", "test")}
    total, held_out = sum(counts.values()), counts["dev"] + counts["test"]
    if not held_out:
        return f"all {total} rows train (earlier versions held out 30 %)"
    return (f"{counts['train']} of {total} rows train, {counts['dev']} are held out for the looks and {counts['test']} "
            "for the evaluation (--dev_share, --test_share)")  # fmt: skip


def visits_line(trained: int, visited: int, steps: int) -> str | None:
    """Return a line if a run of `steps` steps is too short to come to all `trained` forget rows, else None."""
    if visited >= trained:
        return None
    return (f"{steps} steps come to {visited} of the {trained} forget rows: raise --max_unlearn_steps or --batch_size "
            "to train on all")  # fmt: skip
