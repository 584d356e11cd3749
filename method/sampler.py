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

from data_module import TRAINED_STYLES, PromptFormatter, Sequence
from options import FRACTION, SHARE, option
from sources.paraphrase import paraphrase
from sources.rows import Row
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
    replacements: int  # minimum number of different replacement answers
    is_off: bool  # its settings ask for no sequence

    def examples(self, step: int, sampler: UnlearnBatchSampler) -> list[Example]: ...

    def sequences(self, step: int, sampler: UnlearnBatchSampler, formatter: PromptFormatter) -> list[Sequence]: ...


POOL_ROWS = 32  # normal rows of a source that the model answers only to give replacement answers
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
        self.answered: list[list[Row]] = []  # forget and normal rows with an answer; set by fill_responses
        self._prompts: tuple[int, dict] = (-1, {})  # (step, its prompts): all draws of a side share them

    # ---- which rows
    def visit(self, side: str, stream: Stream, count: int, step: int, *, first_id: int = 0, **flags) -> list[Example]:
        """Return `count` examples of a step. Sources take turns, so that each has the same share, whatever its size."""
        sources, examples = self.rows[side], []
        for place in range(step * count, (step + 1) * count):
            source, turn = place % len(sources), place // len(sources)
            index = epoch_index(len(sources[source]), self.seed, stream + source, turn)
            examples.append(Example(side, first_id + len(examples), source, index, **flags))
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

    def trained_prompts(self, steps: int) -> set[str]:
        """Return the forget prompts of the first `steps` steps."""
        return {self.row(example).prompt for example in self.examples("forget", steps)}

    def answer_tokens(self, side: str) -> int:
        """Return the maximum tokens of a side's answers; 0 if no draw uses the side."""
        return max((draw.answer_tokens for draw in self.draws if draw.side == side), default=0)

    # ---- their answers
    def fill_responses(self, answer) -> None:
        """Give every row that the run uses a response, and fill the pool of replacement answers.

        `answer(rows, tokens)` returns the rows with the model's own answers, of at most `tokens` tokens, where a
        response is missing.
        """
        needed = max((draw.replacements for draw in self.draws), default=0)  # by one draw, which draws no answer twice
        for side, sources in self.rows.items():
            pairs, tokens = sorted(self.answered_rows(side)), self.answer_tokens(side)
            if (
                side == "normal" and not pairs and len(self._given_answers()) < needed
            ):  # else too few replacement answers
                pairs = [(s, i) for s, source in enumerate(sources) for i in range(min(len(source), POOL_ROWS))]
                tokens = self.answer_tokens("forget")
            for (s, i), row in zip(pairs, answer([sources[s][i] for s, i in pairs], tokens), strict=True):
                sources[s][i] = row
        sides = ([row for source in sources for row in source] for sources in self.rows.values())
        self.answered = [
            sorted({row.prompt: row for row in side if row.response}.values(), key=lambda row: row.prompt)
            for side in sides
        ]
        self.answered = [side for side in self.answered if side]
        if needed:
            self._fill_pool(needed)

    def _given_answers(self) -> list[str]:
        """Return the true answers in the normal data, each once."""
        rows = (row for source in self.rows["normal"] for row in source)
        return list(dict.fromkeys(answer for row in rows for answer in row.true_answers))

    def _fill_pool(self, needed: int) -> None:
        """Fill the pool with true answers from the normal data; if there are too few, add the model's own answers."""
        self.replacement_pool = [(answer, True) for answer in self._given_answers()]
        if len(self.replacement_pool) < needed:
            rows = [row for source in self.rows["normal"] for row in source]
            own_answers = {row.response: row.complete for row in rows if row.response and not row.true_answers}
            self.replacement_pool += list(own_answers.items())
        if len(self.replacement_pool) < needed:
            name = max(self.draws, key=lambda draw: draw.replacements).name
            raise UsageError(
                f"{name}.answers {needed}: the normal data holds only {len(self.replacement_pool)} different "
                f"answers; lower it (--set {name}.answers=1) or add normal rows"
            )

    # ---- their prompts
    def build_prompt(self, example: Example, step: int, formatter: PromptFormatter) -> tuple[tuple[int, ...], str]:
        """Return (prompt tokens, style of the template) of an example at a step, worded as `Wording` sets."""
        kept_step, prompts = self._prompts
        if kept_step != step:  # a thread may be at another step (engine/prefetch.py): each keeps to its own prompts
            prompts = {}
            self._prompts = (step, prompts)
        key = (example.side, example.example_id, example.source, example.index)
        if key not in prompts:
            prompts[key] = self._build_prompt(example, step, formatter)
        return prompts[key]

    def _build_prompt(self, example: Example, step: int, formatter: PromptFormatter) -> tuple[tuple[int, ...], str]:
        prompt, style = self.row(example).prompt, formatter.style
        place = [example.stream, step, example.example_id]
        rng = np.random.default_rng([self.seed, Stream.PARAPHRASE, *place])
        if rng.random() < self.wording.paraphrase_fraction:
            prompt = paraphrase(prompt, rng)
        rng = np.random.default_rng([self.seed, Stream.TEMPLATE, *place])
        if rng.random() < self.wording.template_fraction:
            other_styles = [other for other in TRAINED_STYLES if other != style]
            style = other_styles[rng.integers(len(other_styles))]
        rng = np.random.default_rng([self.seed, Stream.TURNS, *place])
        has_earlier = self.answered and rng.random() < self.wording.multi_turn_fraction
        earlier = (self._earlier_turn(rng, formatter),) if has_earlier else ()
        return tuple(formatter.prompt(prompt, style, earlier)), style

    def _earlier_turn(self, rng: np.random.Generator, formatter: PromptFormatter) -> tuple[str, str]:
        """Return (prompt, start of its answer) of any row of either side, so that it does not hint at the next turn."""
        side = self.answered[rng.integers(len(self.answered))]
        row = side[rng.integers(len(side))]
        ids = formatter.answer(row.response, complete=False, limit=EARLIER_TOKENS)
        return row.prompt, formatter.tokenizer.decode(ids, skip_special_tokens=True).strip()

    # ---- their continuations
    def replacement_answers(self, step: int, example_id: int, count: int) -> list[tuple[str, bool]]:
        """Return `count` different replacement answers, as (answer, complete), for one forget row of a step."""
        rng = np.random.default_rng([self.seed, Stream.REPLACEMENTS, step, example_id])
        places = rng.choice(len(self.replacement_pool), size=count, replace=False)
        return [self.replacement_pool[i] for i in places]

    def sample_answer_prefix(
        self, example: Example, style: str, step: int, tokens: int, formatter: PromptFormatter
    ) -> tuple[int, ...]:
        """Return the first `tokens` tokens of an answer: of the row's own, if it has one, or of any row's."""
        row = self.row(example)
        rng = np.random.default_rng([self.seed, Stream.PREFIX, example.stream, step, example.example_id])
        side = self.answered[
            rng.integers(len(self.answered))
        ]  # of either side, so that it does not hint at the prompt's
        text = row.response if row.response and rng.random() < 0.5 else side[rng.integers(len(side))].response
        prefix = formatter.answer(text, style, complete=False)[:tokens]
        return tuple(prefix or formatter.answer("", style))

    def sequences(self, step: int, formatter: PromptFormatter) -> list[Sequence]:
        """Return all sequences of a step, over all processes: by forget row, then by normal row."""
        by_draw = [(draw.side, s) for draw in self.draws for s in draw.sequences(step, self, formatter)]
        return [s for _, s in sorted(by_draw, key=lambda pair: (pair[0], pair[1].example_id))]
