"""Draws: which rows a step visits for a term, and which (prompt, continuation, targets) it makes of them.

A new draw is a class like these, in a file of its own, and one line in DRAWS. The fields with a help text are its
settings in a recipe's YAML.
"""

from __future__ import annotations

import dataclasses

from data_module import PromptFormatter, Sequence, make_eot_sequence, with_end
from method.sampler import Example, Stream, UnlearnBatchSampler
from options import COUNT, FRACTION, option


@dataclasses.dataclass(frozen=True)
class RunSizes:
    """What a draw takes from the options of a run: forget rows a step, and tokens of an answer at most."""

    batch_size: int = 2
    max_answer_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class _Draw:
    """What all draws have: a name, the run's sizes, and a way to go over the rows of a step with their prompts."""

    name: str
    sizes: RunSizes
    replacements = 0
    is_off = False

    @property
    def answer_tokens(self) -> int:
        return self.sizes.max_answer_tokens

    def visits(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter):
        """Yield (example, its row, prompt tokens, template) for each example of the step."""
        for example in self.examples(step, sampler):
            yield example, sampler.row(example), *sampler.build_prompt(example, step, formatter)


@dataclasses.dataclass(frozen=True)
class _ForgetDraw(_Draw):
    """The forget rows of a step: `batch_size` of them, the same ones for all draws of this side."""

    side = "forget"
    needs_answer = False

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        return sampler.visit("forget", Stream.FORGET, self.sizes.batch_size, step, needs_answer=self.needs_answer)


@dataclasses.dataclass(frozen=True)
class Answer(_ForgetDraw):
    """Each forget row's own answer after its prompt. A row to which the model is silent makes no sequence: it must not
    be pushed away from silence."""

    needs_answer = True

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        made = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if row.response:
                answer = formatter.answer(row.response, style, complete=row.complete)
                made.append(Sequence(self.name, example.example_id, prompt, tuple(answer)))
        return made


@dataclasses.dataclass(frozen=True)
class Mismatch(_ForgetDraw):
    """Replacement answers after each forget prompt: true answers of normal rows, drawn without repetition
    (Yao et al. 2023, eq. 3)."""

    answers: COUNT = option(5, "replacement answers after each forget prompt (K)")
    empty_fraction: FRACTION = option(0.0, "fraction of them that are empty: the end of the turn at once")

    @property
    def replacements(self) -> int:
        return self.answers

    @property
    def is_off(self) -> bool:
        return self.answers == 0

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        made, empty = [], round(self.answers * self.empty_fraction)
        for example, _, prompt, style in self.visits(step, sampler, formatter):
            drawn = sampler.replacement_answers(step, example.example_id, self.answers - empty)
            for text, complete in drawn + [("", True)] * empty:
                answer = formatter.answer(text, style, complete=complete)
                made.append(Sequence(self.name, example.example_id, prompt, tuple(answer)))
        return made


@dataclasses.dataclass(frozen=True)
class Stop(_ForgetDraw):
    """The end of the turn after a forget prompt, and, with a prefix, after every token of an answer that is begun for
    the model. Prefixes of the step's own forget rows are their whole answers."""

    after_batch: bool = option(True, "the step's own forget rows are among them, not the further rows alone")
    rows: COUNT = option(0, "further forget rows a step, over all processes; each costs a prompt")
    prefill_tokens: COUNT = option(0, "tokens of an answer put after a further row's prompt (0: no prefix at all)")

    @property
    def needs_answer(self) -> bool:
        return self.prefill_tokens > 0

    @property
    def is_off(self) -> bool:
        return not (self.after_batch or self.rows or self.prefill_tokens)

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        first = self.sizes.batch_size
        further = sampler.visit("forget", Stream.STOP, self.rows, step, first_id=first, needs_answer=False)
        batch = super().examples(step, sampler) if self.after_batch or self.prefill_tokens else []
        return batch + further

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        made = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            (end,), own = formatter.answer("", style), example.example_id < self.sizes.batch_size
            empty = [Sequence(self.name, example.example_id, prompt, (end,))] * (self.after_batch or not own)
            begun = []
            if self.prefill_tokens and (row.response or not own):
                prefix = (
                    formatter.answer(row.response, style, complete=row.complete) if own
                    else sampler.sample_answer_prefix(example, style, step, self.prefill_tokens, formatter)
                )  # fmt: skip
                begun = [make_eot_sequence(self.name, example.example_id, prompt, prefix, end)]
            made += begun + empty if own else empty + begun
        return made


@dataclasses.dataclass(frozen=True)
class Wanted(_ForgetDraw):
    """Each forget row's own wanted answer after its prompt, where the row has one."""

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        made = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if row.wanted:
                made.append(Sequence(self.name, example.example_id, prompt, tuple(formatter.answer(row.wanted, style))))
        return made


@dataclasses.dataclass(frozen=True)
class Retain(_Draw):
    """Normal rows with their answers; further rows hold the model at their first answer token, or at a prefix."""

    rows: COUNT = option(0, "normal rows a step, over all processes (0: as many as --batch_size)")
    max_tokens: COUNT = option(0, "longer answers of normal rows lose their end (0: as --max_answer_tokens)")
    first_token_rows: COUNT = option(0, "further normal rows a step, looked at where the answer begins; a prompt each")
    prefill_tokens: COUNT = option(0, "tokens of an answer put after a further row's prompt (0: its first place alone)")
    side = "normal"

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens or self.sizes.max_answer_tokens

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        rows = self.rows or self.sizes.batch_size
        whole = sampler.visit("normal", Stream.RETAIN, rows, step)
        further = sampler.visit(
            "normal", Stream.RETAIN_FIRST, self.first_token_rows, step, first_id=rows, needs_answer=False
        )
        return whole + further

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        made = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if example.needs_answer:
                answer = formatter.answer(row.response, style, complete=row.complete, limit=self.answer_tokens)
            elif self.prefill_tokens:
                prefix = sampler.sample_answer_prefix(example, style, step, self.prefill_tokens, formatter)
                answer = with_end(prefix, formatter.answer("", style)[0])
            else:  # the KL at the first place does not depend on which token follows: any one will do
                answer = formatter.answer("", style)
            made.append(Sequence(self.name, example.example_id, prompt, tuple(answer)))
        return made


DRAWS = {"answer": Answer, "mismatch": Mismatch, "stop": Stop, "wanted": Wanted, "retain": Retain}
