"""What a draw is: which rows a step visits for a term, and which sequences it makes of them."""

from __future__ import annotations

import dataclasses
from typing import Optional

from method.sampler import Example, Stream, UnlearnBatchSampler
from options import option
from prompts.formatter import PromptFormatter
from sources.rows import Row

TEXT = "text"  # the kind of a passage


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """The options of a run that draws use: forget rows per step, and maximum tokens of an answer."""

    batch_size: int = 2
    max_answer_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class BaseDraw:
    """The base of all draws: a name, the run's sizes, and an iterator over the rows of a step with their prompts."""

    name: str
    sizes: RunSizes
    replacements = 0
    alternatives = 0  # of each forget row, that it draws from
    is_off = False
    only_given = own_words = False  # what the original is asked about each forget row (method/draws.py)
    teaches = False  # the model learns its rows: they are no rows of an unlearning run
    apart = False  # its sequences are no part of a step's: another pass takes them
    needs_prompt = False  # it puts other answers after a row's prompt, so rows of text give it no sequence

    @property
    def answer_tokens(self) -> int:
        """Maximum tokens of an answer."""
        return self.sizes.max_answer_tokens

    def visits(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter):
        """Yield (example, its row, prompt tokens, style of the template) for each example of the step."""
        for example in self.examples(step, sampler):
            yield example, sampler.row(example), *sampler.build_prompt(example, step, formatter)


@dataclasses.dataclass(frozen=True)
class ForgetDraw(BaseDraw):
    """The `batch_size` forget rows of a step, the same rows for all forget draws.

    A draw that needs a prompt leaves out those that are text. One of some kinds takes rows of these categories alone,
    so that a run may forget people, texts and rules, each in its way. The kind of a passage of text is `text`.
    """

    kinds: Optional[tuple[str, ...]] = option(  # noqa: UP045
        None, "categories of the rows that it takes; text: passages (not given: all rows)"
    )
    side = "forget"
    needs_answer = False

    def takes(self, row: Row) -> bool:
        """Return whether a row gives it a sequence."""
        return self.is_of_kind(row) and not (self.needs_prompt and row.is_text)

    def is_of_kind(self, row: Row) -> bool:
        """Return whether a row is of a kind that it takes."""
        return self.kinds is None or (TEXT if row.is_text else row.category) in self.kinds

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        examples = sampler.visit("forget", Stream.FORGET, self.sizes.batch_size, step, needs_answer=self.needs_answer)
        return [example for example in examples if self.takes(sampler.row(example))]
