"""The rows of both sides, and the sampling of each step's examples, prompts and continuations.

Every sample is a pure function of rows, seed and step. It does not depend on the number of processes, on earlier
samples, or on a resume.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import Protocol

import numpy as np

from data_module import Sequence
from options import FRACTION, SHARE, option
from prompts.chat_template import Turn
from prompts.formatter import TRAINED_STYLES, PromptFormatter
from sources.names import put_name
from sources.paraphrase import paraphrase
from sources.rows import OtherAnswer, Row
from utils import UsageError


@functools.lru_cache(maxsize=64)
def _epoch_order(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """Return the shuffled order of `count` rows in one epoch."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)


def epoch_index(count: int, seed: int, stream: int, place: int) -> int:
    """Return the row at `place` (0, 1, 2, ...) of an endless stream, which shuffles `count` rows anew each epoch."""
    return int(_epoch_order(count, seed, stream, place // count)[place % count])


class Stream(enum.IntEnum):
    """Numbers of the random streams. Each stream from 100 on has one number a source: 100 + i, 200 + i, ..."""

    REPLACEMENTS = 3
    TEMPLATE = 4
    PARAPHRASE = 5
    PREFIX = 6
    TURNS = 7
    LEARN = 8
    ALTERNATIVE = 9
    RETAIN = 100
    RETAIN_FIRST = 200
    FORGET = 300
    STOP = 400


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a step words its prompts, on both sides alike, so that the form does not give the side away."""

    paraphrase_fraction: FRACTION = option(
        0.0, "fraction of the prompts that are paraphrased (a command as a question)"
    )
    template_fraction: SHARE = option(0.0, "fraction of the prompts in another template than --template")
    multi_turn_fraction: SHARE = option(
        0.0, "fraction of the prompts that are the second turn of a conversation, after any row"
    )


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a step. `source`, `index`: its place on its side. `needs_answer`: whether its response is used."""

    side: str  # "forget" or "normal"
    example_id: int
    source: int
    index: int
    needs_answer: bool = True

    @property
    def stream(self) -> Stream:
        """The stream of the side: all draws of a side word an example in the same way."""
        return Stream.FORGET if self.side == "forget" else Stream.RETAIN


class Draw(Protocol):
    """A draw: chooses the rows of a step for a term and builds sequences from them (method/draws.py)."""

    name: str
    side: str  # of its rows: "forget" or "normal"
    answer_tokens: int  # longer answers are truncated
    teaches: bool  # the model learns its rows
    apart: bool  # its sequences are no part of a step's
    needs_prompt: bool  # rows of text give it no sequence
    replacements: int  # minimum number of different replacement answers
    is_off: bool  # its settings ask for no sequence

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]: ...

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]: ...


POOL_ROWS = 32  # normal rows of a source that the model answers at a time, only to give replacement answers
EARLIER_TOKENS = 16  # of the answer in an earlier turn


class UnlearnBatchSampler:
    """The rows of both sides and the draws of a run; samples a step's sequences from seed and step number."""

    def __init__(
        self, forget: list[list[Row]], normal: list[list[Row]], draws: list[Draw], *, seed: int, steps: int,
        wording: Wording | None = None,
    ):  # fmt: skip
        self.rows = {"forget": forget, "normal": normal}
        self.draws, self.seed, self.steps, self.wording = draws, seed, steps, wording or Wording()
        self.replacement_pool: list[tuple[str, bool]] = []  # (answer, complete); set by fill_responses
        self.answered: list[tuple[str, list[Row]]] = []  # (side, its prompts with an answer); set by fill_responses
        self._prompts: tuple[int, dict] = (-1, {})  # (step, its prompts): all draws of a side share them

    # ---- which rows
    def visit(
        self, side: str, stream: Stream, count: int, step: int, *, first_id: int = 0, prompts_only: bool = False,
        **flags,
    ) -> list[Example]:  # fmt: skip
        """Return `count` examples of a step. Sources take turns, so that each has the same share, whatever its size.

        With `prompts_only`, sources of text have no turn, and there are no examples if all are text.
        """
        sources = [i for i, rows in enumerate(self.rows[side]) if not (prompts_only and rows[0].is_text)]
        examples: list[Example] = []
        for place in range(step * count, (step + 1) * count) if sources else ():
            source, turn = sources[place % len(sources)], place // len(sources)
            index = epoch_index(len(self.rows[side][source]), self.seed, stream + source, turn)
            examples.append(Example(side, first_id + len(examples), source, index, **flags))
        return examples

    def epoch(self, side: str, count: int, step: int) -> list[Example]:
        """Return `count` examples of a step, so that all rows of a side's sources come once an epoch."""
        sizes = [len(rows) for rows in self.rows[side]]
        ends = np.cumsum(sizes)
        examples = []
        for place in range(step * count, (step + 1) * count):
            index = epoch_index(int(ends[-1]), self.seed, Stream.LEARN, place)
            source = int(np.searchsorted(ends, index, side="right"))
            examples.append(Example(side, len(examples), source, index - int(ends[source]) + sizes[source]))
        return examples

    def row(self, example: Example) -> Row:
        """Return the row of an example."""
        return self.rows[example.side][example.source][example.index]

    def examples(self, side: str, steps: int | None = None) -> set[Example]:
        """Return all examples of a side's draws in the first `steps` steps (None: in the whole run)."""
        draws = [draw for draw in self.draws if draw.side == side]
        steps = self.steps if steps is None else steps
        return {e for step in range(steps) for draw in draws for e in draw.examples(step, self)}

    def answered_rows(self, side: str) -> set[tuple[int, int]]:
        """Return the (source, row) pairs of a side whose response the run uses."""
        return {(e.source, e.index) for e in self.examples(side) if e.needs_answer}

    def examples_per_step(self) -> dict[str, int]:
        """Return {side: rows per step}, over all processes."""
        return {side: len({e.example_id for e in self.examples(side, 1)}) for side in self.rows}

    def trained_keys(self, steps: int) -> dict[str, set[str]]:
        """Return {side: the keys of the rows whose prompt stood in one of the first `steps` steps}, and "learned":
        those of rows that the model learned, if there are some."""
        keys: dict[str, set[str]] = {side: set() for side in self.rows}
        for step in range(steps):
            for example, teaches in {(e, draw.teaches) for draw in self.draws for e in draw.examples(step, self)}:
                keys.setdefault("learned" if teaches else example.side, set()).add(self.row(example).key)
                if earlier := self._earlier_row(example, step):
                    keys[earlier[0]].add(earlier[1].key)
        return keys

    def answer_tokens(self, side: str) -> int:
        """Return the maximum tokens of a side's answers; 0 if no draw uses the side."""
        return max((draw.answer_tokens for draw in self.draws if draw.side == side), default=0)

    # ---- their answers
    def fill_responses(self, answer) -> None:
        """Give every row that the run uses a response, and fill the pool of replacement answers.

        `answer(rows, tokens)` returns the rows with the model's own answers, of at most `tokens` tokens, where a
        response is missing.
        """
        for side in self.rows:
            self._answer(side, sorted(self.answered_rows(side)), answer, self.answer_tokens(side))
        needed = max((draw.replacements for draw in self.draws), default=0)  # by one draw, which draws no answer twice
        if needed:
            self._fill_pool(needed, answer)
        answered = {side: {row.key: row for source in sources for row in source if row.response and not row.is_text}
                    for side, sources in self.rows.items()}  # fmt: skip
        self.answered = [(side, [rows[key] for key in sorted(rows)]) for side, rows in answered.items() if rows]

    def _answer(self, side: str, pairs: list[tuple[int, int]], answer, tokens: int) -> None:
        """Give the rows at these (source, row) places a response."""
        sources = self.rows[side]
        for (s, i), row in zip(pairs, answer([sources[s][i] for s, i in pairs], tokens), strict=True):
            sources[s][i] = row

    def _given_answers(self) -> list[str]:
        """Return the true answers in the normal data, each once."""
        rows = (row for source in self.rows["normal"] for row in source)
        return list(dict.fromkeys(answer for row in rows for answer in row.true_answers))

    def _own_answers(self) -> list[tuple[str, bool]]:
        """Return the model's own answers to normal rows, each once, as (answer, complete)."""
        rows = (row for source in self.rows["normal"] for row in source if not row.is_text)
        return list({row.response: row.complete for row in rows if row.response and not row.true_answers}.items())

    def _fill_pool(self, needed: int, answer) -> None:
        """Fill the pool with true answers from the normal data; if there are too few, add the model's own answers.

        The steps of a short run may use fewer normal rows than the pool needs; then the model answers further ones.
        """
        given, sources = [(text, True) for text in self._given_answers()], self.rows["normal"]
        self.replacement_pool = given if len(given) >= needed else given + self._own_answers()
        places = [(s, i) for i in range(max(map(len, sources), default=0)) for s in range(len(sources))
                  if i < len(sources[s]) and not sources[s][i].is_text]  # fmt: skip
        tokens = self.answer_tokens("normal") if self.answered_rows("normal") else self.answer_tokens("forget")
        chunk = POOL_ROWS * len(sources)
        for start in range(0, len(places), chunk):
            if len(self.replacement_pool) >= needed:
                break
            self._answer("normal", sorted(places[start : start + chunk]), answer, tokens)
            self.replacement_pool = given + self._own_answers()
        if len(self.replacement_pool) < needed:
            name = max(self.draws, key=lambda draw: draw.replacements).name
            if all(rows[0].is_text for rows in sources):
                raise UsageError(f"{name}.answers {needed}: replacement answers are those of normal prompts, and "
                                 "--normal_text has none: name some with --normal_data")  # fmt: skip
            raise UsageError(
                f"{name}.answers {needed}: the normal data holds only {len(self.replacement_pool)} different "
                f"answers; lower it (--set {name}.answers=1) or add normal rows"
            )

    # ---- their prompts
    def build_prompt(
        self, example: Example, step: int, formatter: PromptFormatter, about: OtherAnswer | None = None
    ) -> tuple[tuple[int, ...], str]:  # fmt: skip
        """Return (prompt tokens, style of the template) of an example at a step, worded as `Wording` sets.

        about: ask the same about its invented name.
        """
        if about:
            return self._build_prompt(example, step, formatter, about)
        kept_step, prompts = self._prompts
        if kept_step != step:  # a thread may be at another step (engine/prefetch.py): each keeps to its own prompts
            prompts = {}
            self._prompts = (step, prompts)
        key = (example.side, example.example_id, example.source, example.index)
        if key not in prompts:
            prompts[key] = self._build_prompt(example, step, formatter)
        return prompts[key]

    def _build_prompt(
        self, example: Example, step: int, formatter: PromptFormatter, about: OtherAnswer | None = None
    ) -> tuple[tuple[int, ...], str]:  # fmt: skip
        row, style = self.row(example), formatter.style
        if about:
            row = dataclasses.replace(row, prompt=put_name(row.prompt, about.name, about.invented))
        if row.is_text:  # it has no wording: its tokens are trained on as they stand
            return tuple(formatter.prompt_of(row)), style
        place = [example.stream, step, example.example_id]
        rng = np.random.default_rng([self.seed, Stream.PARAPHRASE, *place])
        if rng.random() < self.wording.paraphrase_fraction:
            row = dataclasses.replace(row, prompt=paraphrase(row.prompt, rng))
        rng = np.random.default_rng([self.seed, Stream.TEMPLATE, *place])
        if rng.random() < self.wording.template_fraction:
            other_styles = [other for other in TRAINED_STYLES if other != style]
            style = other_styles[rng.integers(len(other_styles))]
        found = self._earlier_row(example, step)
        earlier = self._earlier_turns(found[1], formatter) if found else ()
        return tuple(formatter.prompt_of(row, style, earlier)), style

    def _earlier_row(self, example: Example, step: int) -> tuple[str, Row] | None:
        """Return (side, row) of the turn before an example; None if it is the first turn of its talk, or text.

        The row may be any of either side, so that it does not hint at the next turn.
        """
        if not self.answered or not self.wording.multi_turn_fraction or self.row(example).is_text:
            return None
        rng = np.random.default_rng([self.seed, Stream.TURNS, example.stream, step, example.example_id])
        if rng.random() >= self.wording.multi_turn_fraction:
            return None
        side, rows = self.answered[rng.integers(len(self.answered))]
        return side, rows[rng.integers(len(rows))]

    def _earlier_turns(self, row: Row, formatter: PromptFormatter) -> tuple[Turn, Turn]:
        """Return the prompt of a row and the start of its answer, as turns."""
        ids = formatter.answer(row.response, complete=False, limit=EARLIER_TOKENS)
        return ("user", row.prompt), ("assistant", formatter.tokenizer.decode(ids, skip_special_tokens=True).strip())

    # ---- their continuations
    def replacement_answers(self, step: int, example_id: int, count: int) -> list[tuple[str, bool]]:
        """Return `count` different replacement answers, as (answer, complete), for one forget row of a step."""
        rng = np.random.default_rng([self.seed, Stream.REPLACEMENTS, step, example_id])
        places = rng.choice(len(self.replacement_pool), size=count, replace=False)
        return [self.replacement_pool[i] for i in places]

    def sample_alternatives(self, example: Example, step: int, count: int) -> list[OtherAnswer]:
        """Return up to `count` different alternatives of a forget row for one step."""
        row = self.row(example)
        rng = np.random.default_rng([self.seed, Stream.ALTERNATIVE, step, example.example_id])
        return [row.alternatives[i] for i in rng.permutation(len(row.alternatives))[:count]]

    def sample_answer_prefix(
        self, example: Example, style: str, step: int, tokens: int, formatter: PromptFormatter
    ) -> tuple[int, ...]:
        """Return the first `tokens` tokens of an answer: of the row's own, if it has one, or of any row's."""
        row = self.row(example)
        rng = np.random.default_rng([self.seed, Stream.PREFIX, example.stream, step, example.example_id])
        _, rows = self.answered[rng.integers(len(self.answered))]  # of either side, so that it hints at none
        text = row.response if row.response and rng.random() < 0.5 else rows[rng.integers(len(rows))].response
        prefix = formatter.answer(text, style, complete=False)[:tokens]
        return tuple(prefix or formatter.answer("", style))

    def sequences(self, step: int, formatter: PromptFormatter) -> list[Sequence]:
        """Return all sequences of a step, over all processes: by forget row, then by normal row."""
        by_draw = [(draw.side, s) for draw in self.draws if not draw.apart
                   for s in draw.sequences(step, self, formatter)]  # fmt: skip
        return [s for _, s in sorted(by_draw, key=lambda pair: (pair[0], pair[1].example_id))]
