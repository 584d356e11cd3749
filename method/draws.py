"""Draws: each chooses the rows of a step for a term and builds (prompt, continuation, targets) from them.

A new draw is a class like these, in a file of its own, with an import and an entry in DRAWS. Its fields with a help
text are its settings in a recipe's YAML.
"""

from __future__ import annotations

import dataclasses
import difflib

from data_module import Counterpart, Sequence, make_eot_sequence, with_end
from method.draw import BaseDraw, ForgetDraw
from method.sampler import Example, Stream, UnlearnBatchSampler
from options import COUNT, FRACTION, POSITIVE, WEIGHT, option
from prompts.formatter import PromptFormatter
from sources.names import put_name, spans_of_name
from sources.rows import Row
from sources.words import own_words, spans_of


@dataclasses.dataclass(frozen=True)
class Answer(ForgetDraw):
    """Each forget row's own answer after its prompt.

    A row with an empty answer gives no sequence, since unlearning it would push the model away from an empty answer.
    """

    only_given: bool = option(False, "leave out rows whose answer the model does not give when it is asked")
    needs_answer = True

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if row.response or row.is_text:
                answer = formatter.answer_of(row, style)
                telling = None
                if row.wanted or row.alternatives:
                    words = own_words(row)
                    telling = formatter.tokens_within(answer, lambda text, words=words: spans_of(text, words))
                sequences.append(Sequence(self.name, example.example_id, prompt, tuple(answer), telling=telling))
        return sequences


@dataclasses.dataclass(frozen=True)
class Mismatch(ForgetDraw):
    """Replacement answers after each forget prompt (Yao et al. 2023, eq. 3).

    They are true answers of normal rows, drawn without repetition within a row and step.
    """

    answers: COUNT = option(5, "replacement answers after each forget prompt (K)")
    empty_fraction: FRACTION = option(0.0, "fraction of the replacement answers that are empty (immediate end of turn)")
    needs_prompt = True

    @property
    def replacements(self) -> int:
        return self.answers

    @property
    def is_off(self) -> bool:
        return self.answers == 0

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences, num_empty = [], round(self.answers * self.empty_fraction)
        for example, _, prompt, style in self.visits(step, sampler, formatter):
            drawn = sampler.replacement_answers(step, example.example_id, self.answers - num_empty)
            for text, complete in drawn + [("", True)] * num_empty:
                answer = formatter.answer(text, style, complete=complete)
                sequences.append(Sequence(self.name, example.example_id, prompt, tuple(answer)))
        return sequences


@dataclasses.dataclass(frozen=True)
class Stop(ForgetDraw):
    """End-of-turn after a forget prompt and, with `prefill_tokens`, after every token of a prefilled answer.

    The step's own forget rows are prefilled with their whole answers.
    """

    after_batch: bool = option(
        True, "put end-of-turn after the step's own forget prompts too, not only after further rows"
    )
    rows: COUNT = option(0, "further forget rows per step, over all processes")
    prefill_tokens: COUNT = option(
        0, "tokens of the prefilled answer of a further row (0: no prefilled answers at all)"
    )
    unless_wanted: bool = option(False, "leave out rows with a wanted answer: another term teaches that")
    needs_prompt = True

    def takes(self, row: Row) -> bool:
        return super().takes(row) and not (self.unless_wanted and row.wanted)

    @property
    def needs_answer(self) -> bool:
        return self.prefill_tokens > 0

    @property
    def is_off(self) -> bool:
        return not (self.after_batch or self.rows or self.prefill_tokens)

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        first = self.sizes.batch_size
        further = sampler.visit(
            "forget", Stream.STOP, self.rows, step, first_id=first, prompts_only=True, needs_answer=False
        )
        batch = super().examples(step, sampler) if self.after_batch or self.prefill_tokens else []
        return batch + [example for example in further if self.takes(sampler.row(example))]

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            (end,), in_batch = formatter.answer("", style), example.example_id < self.sizes.batch_size
            empty = [Sequence(self.name, example.example_id, prompt, (end,))] * (self.after_batch or not in_batch)
            prefilled = []
            if self.prefill_tokens and (row.response or not in_batch):
                prefix = (
                    formatter.answer_of(row, style) if in_batch
                    else sampler.sample_answer_prefix(example, style, step, self.prefill_tokens, formatter)
                )  # fmt: skip
                prefilled = [make_eot_sequence(self.name, example.example_id, prompt, prefix, end)]
            sequences += prefilled + empty if in_batch else empty + prefilled
        return sequences


@dataclasses.dataclass(frozen=True)
class Wanted(ForgetDraw):
    """Each forget row's wanted answer after its prompt, if the row has one."""

    own_words: bool = option(False, "a row without a wanted answer gets the model's own words for not knowing")
    needs_prompt = True

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if row.wanted:
                sequences.append(
                    Sequence(self.name, example.example_id, prompt, tuple(formatter.answer(row.wanted, style)))
                )
        return sequences


@dataclasses.dataclass(frozen=True)
class Alternative(ForgetDraw):
    """Other answers after each forget prompt, such as a model without the knowledge gives (run/alternatives.py)."""

    answers: COUNT = option(2, "other answers after each forget prompt in a step")
    samples: COUNT = option(8, "other answers that the original is asked for, of each forget prompt")
    temperature: WEIGHT = option(1.0, "sampling temperature of these answers")
    needs_prompt = True

    @property
    def alternatives(self) -> int:
        return self.samples

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        return [
            Sequence(self.name, example.example_id, prompt, tuple(formatter.answer(text, style)))
            for example, _, prompt, style in self.visits(step, sampler, formatter)
            for text in (other.text for other in sampler.sample_alternatives(example, step, self.answers))
        ]


@dataclasses.dataclass(frozen=True)
class Counterfactual(Alternative):
    """Other answers after each forget prompt, at which the original is asked about an invented name in the place of the
    own.

    A loss that compares with the original then compares with what it says of somebody unknown. Tokens of the names
    themselves are not compared.
    """

    own: bool = option(False, "the row's own answer as well, so that it becomes as likely as of an invented name")

    @property
    def needs_answer(self) -> bool:
        return self.own

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            others = sampler.sample_alternatives(example, step, self.answers)
            own = [(row.response, others[0], row.complete)] if self.own and others and row.response else []
            for said, about, complete in own + [(other.text, other, True) for other in others]:
                answer = formatter.answer(said, style, complete=complete)
                asked = formatter.answer(put_name(said, about.name, about.invented), style, complete=complete)
                other_prompt, _ = sampler.build_prompt(example, step, formatter, about)
                own_name, other_name = (
                    formatter.tokens_within(tokens, lambda text, name=name: spans_of_name(text, name))
                    for tokens, name in ((answer, about.name), (asked, about.invented))
                )
                places = same_places(
                    [-1 if named else token for token, named in zip(answer, own_name, strict=True)],
                    [-2 if named else token for token, named in zip(asked, other_name, strict=True)],
                )
                counterpart = Counterpart(other_prompt, tuple(asked), places)
                sequences.append(
                    Sequence(self.name, example.example_id, prompt, tuple(answer), counterparts=(counterpart,))
                )
        return sequences


@dataclasses.dataclass(frozen=True)
class ShortContext(ForgetDraw):
    """Each forget row's own answer, of which the original is asked piece by piece, shown the few tokens before a piece.

    A loss that compares with the original then compares with what it says where it cannot tell which text it is in.
    """

    context: POSITIVE = option(1, "tokens before a piece that the original is shown, after the model's start token")
    piece: POSITIVE = option(2, "tokens of a piece")
    needs_answer = True

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences, start = [], tuple(formatter.text_start)
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            answer = tuple(formatter.answer_of(row, style))
            tokens, counterparts = prompt + answer, []
            for first in range(len(prompt), len(tokens), self.piece):
                piece = tokens[first : first + self.piece]
                shown = start + tokens[max(first - self.context, len(start)) : first]
                counterparts.append(Counterpart(shown, piece, tuple(range(len(piece)))))
            sequences.append(Sequence(self.name, example.example_id, prompt, answer, counterparts=tuple(counterparts)))
        return sequences


def same_places(tokens: list[int], others: list[int]) -> tuple[int, ...]:
    """Return for each token the place among `others` of the same token of the same text, -1 for none."""
    places = [-1] * len(tokens)
    for block in difflib.SequenceMatcher(None, tokens, others, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            places[block.a + i] = block.b + i
    return tuple(places)


@dataclasses.dataclass(frozen=True)
class Retain(BaseDraw):
    """Normal rows with their answers, and further normal rows with only a first answer token or a prefilled answer.

    The further rows are prompts: in a text, no token begins an answer.
    """

    rows: COUNT = option(0, "normal rows per step, over all processes (0: as many as --batch_size)")
    max_tokens: COUNT = option(0, "maximum tokens of a normal row's answer (0: as --max_answer_tokens)")
    first_token_rows: COUNT = option(0, "further normal rows per step, with a loss only where the answer starts")
    prefill_tokens: COUNT = option(
        0, "tokens of the prefilled answer of a further row (0: only the first answer token)"
    )
    side = "normal"

    @property
    def answer_tokens(self) -> int:
        return self.max_tokens or self.sizes.max_answer_tokens

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        rows = self.rows or self.sizes.batch_size
        with_answers = sampler.visit("normal", Stream.RETAIN, rows, step)
        further = sampler.visit(
            "normal", Stream.RETAIN_FIRST, self.first_token_rows, step, first_id=rows, prompts_only=True,
            needs_answer=False,
        )  # fmt: skip
        return with_answers + further

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        sequences = []
        for example, row, prompt, style in self.visits(step, sampler, formatter):
            if example.needs_answer:
                answer = formatter.answer_of(row, style, limit=self.answer_tokens)
            elif self.prefill_tokens:
                prefix = sampler.sample_answer_prefix(example, style, step, self.prefill_tokens, formatter)
                answer = with_end(prefix, formatter.answer("", style)[0])
            else:  # the KL at the first place does not depend on the token that follows it
                answer = formatter.answer("", style)
            sequences.append(Sequence(self.name, example.example_id, prompt, tuple(answer)))
        return sequences


@dataclasses.dataclass(frozen=True)
class Learn(BaseDraw):
    """Every normal row with its answer once an epoch, in an order drawn anew for each epoch, whatever its source."""

    side = "normal"
    teaches = True

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]:
        return sampler.epoch("normal", self.sizes.batch_size, step)

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]:
        return [
            Sequence(self.name, example.example_id, prompt, tuple(formatter.answer_of(row, style)))
            for example, row, prompt, style in self.visits(step, sampler, formatter)
        ]


DRAWS = {
    "answer": Answer,
    "mismatch": Mismatch,
    "stop": Stop,
    "wanted": Wanted,
    "alternative": Alternative,
    "counterfactual": Counterfactual,
    "short_context": ShortContext,
    "retain": Retain,
    "learn": Learn,
}
