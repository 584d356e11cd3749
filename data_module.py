"""Rows -> splits -> tokenised sequences -> the rows of one step.

Everything here is a pure function of the rows, the seed and the step number: no draw depends on
how many processes run, on what was drawn before, or on when a run was resumed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import re

import numpy as np

from sources.paraphrase import paraphrase
from sources.rows import Row
from utils import UsageError, context_length, log

TRAINED_ON = "trained_on.json"  # beside a model: hashes of the forget prompts that its run trained on


# ------------------------------------------------------------------------------------------------ splits
def _same(prompt: str) -> str:
    """What makes two prompts the same one: their words, whatever the case and the space between them."""
    return " ".join(prompt.casefold().split())


def prompt_hash(prompt: str) -> str:
    """Names a prompt without telling it: what was to be forgotten does not stand in the folder of the model."""
    return hashlib.sha256(_same(prompt).encode()).hexdigest()[:16]


def split_of(prompt: str, seed: int, dev_share: float, test_share: float) -> str:
    """'train', 'dev' or 'test', from the prompt alone: every row of a prompt, in any file, goes the same way."""
    digest = hashlib.sha256(f"{seed}\n{_same(prompt)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test_share else "dev" if place < test_share + dev_share else "train"


def split_rows(rows: list[Row], seed: int, dev_share: float, test_share: float) -> dict[str, list[Row]]:
    """Rows by split. Where nothing would be left to train on (a handful of rows), all of them train."""
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        parts[split_of(row.prompt, seed, dev_share, test_share)].append(row)
    if not parts["train"]:
        log.warning("only %d rows: all are trained on, none is held out", len(rows))
        parts = {"train": list(rows), "dev": [], "test": []}
    return parts


def split_sources(sources: list[list[Row]], options) -> list[dict[str, list[Row]]]:
    """`split_rows` of every source by itself, as training and evaluation both take them: what is held out agrees.

    What a source of a handful trains on, no other holds out."""
    parts = [split_rows(rows, options.seed, options.dev_share, options.test_share) for rows in sources]
    shares = (options.seed, options.dev_share, options.test_share)
    trained = {_same(row.prompt) for part in parts for row in part["train"] if split_of(row.prompt, *shares) != "train"}
    for part in parts if trained else ():
        for split in ("dev", "test"):
            part["train"] += [row for row in part[split] if _same(row.prompt) in trained]
            part[split] = [row for row in part[split] if _same(row.prompt) not in trained]
    return parts


def refuse_overlap(forget: list[Row], normal: list[Row]) -> None:
    """A prompt on both sides would be pushed both ways: an error that lists them."""
    normal_prompts = {_same(row.prompt) for row in normal}
    both = sorted({row.prompt for row in forget if _same(row.prompt) in normal_prompts})
    if both:
        shown = "; ".join(repr(prompt[:60]) for prompt in both[:5]) + (" ..." if len(both) > 5 else "")
        raise UsageError(
            f"{len(both)} prompts are in --forget_data and in --normal_data, remove them from one: {shown}"
        )


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """At most `count` rows, one a prompt, in an order drawn from the seed."""
    one_a_prompt = list({row.prompt: row for row in rows}.values())
    order = np.random.default_rng([seed, 11]).permutation(len(one_a_prompt))[:count]
    return [one_a_prompt[i] for i in order]


# -------------------------------------------------------------------------------------------- tokenising
OTHER_STYLES = ("qa", "qa_space", "raw")
DAY = datetime.date(2024, 7, 26)  # of Llama 3's own templates
TURN = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]  # to see a chat template by
TRAINED_STYLES = ("qa", "qa_space", "qa_space", "raw")  # people paste the published prompt with its space


def default_template(tokenizer) -> str | None:
    """The template of a talk; of several by name (one may be for tools) the one that is called default."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _without_today(template: str) -> str:
    """A chat template that calls for today's date (Llama 3's does) with the day of the code in its place: else the
    original's states, kept before midnight, would be those of other prompts, and a resumed run another run."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: repr(DAY.strftime(call[2])), template)


class PromptFormatter:
    """Puts prompts and answers into tokens. A prompt's tokens do not depend on its answer.

    Styles: `chat` is the tokenizer's own template; `qa` the published template, whose prompt ends
    at "Answer:" while the answer begins with its space; `qa_space` the same as people paste it, with
    the space in the prompt; `raw` the bare prompt.
    """

    def __init__(self, tokenizer, template: str, max_prompt_tokens: int, max_answer_tokens: int):
        self.chat_template = _without_today(default_template(tokenizer) or "")
        if template == "chat" and not self.chat_template:
            raise UsageError("--template chat: this model's tokenizer has no chat template; use auto, qa or raw")
        self.tokenizer = tokenizer
        self.style = template if template != "auto" else ("chat" if self.chat_template else "qa")
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = self.longest_answer = max_answer_tokens
        self.cut: set[str] = set()  # prompts that were too long
        plain = self._ids("a")
        with_special = tokenizer("a")["input_ids"]
        # what the tokenizer puts before a text (OPT: </s>); nothing where it adds nothing
        self.start = with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []
        self._end = {style: self._end_of_turn(style) for style in ("chat", *OTHER_STYLES)}
        joints = {style: self._joint(style) for style in self._end}
        self._joints = {style: (end, self._ids(end), space) for style, (end, space) in joints.items()}

    def fit(self, config, answer_tokens: int) -> None:
        """Cut prompts so that they and an answer lie within the model's context; UsageError where none is left."""
        self.longest_answer = answer_tokens
        context = context_length(config)
        if context and context < answer_tokens + 16:
            raise UsageError(f"answers of {answer_tokens} tokens leave no room in the model's context of {context}: "
                             "lower --max_answer_tokens (or --max_new_tokens)")  # fmt: skip
        if context:
            self.max_prompt_tokens = min(self.max_prompt_tokens, context - answer_tokens)

    def _chat(self, turns: list[dict], ask: bool = False) -> str:
        """Turns of a talk in the tokenizer's own template; `ask`: up to where the next answer begins."""
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, tokenize=False,
                                                  add_generation_prompt=ask)  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _ids_after(self, before: str, alone: list[int], text: str) -> list[int]:
        """Token ids of `text` as they are where it follows `before`, whose own ids are `alone`: some tokenizers
        (Llama's) put a space before a text that stands alone, and the first answer token would be one that no model
        says there."""
        joined = self._ids(before + text)
        return joined[len(alone) :] if joined[: len(alone)] == alone else self._ids(text)

    def _end_of_turn(self, style: str) -> int:
        """The token that ends an answer: in a chat, the first special token after the assistant's words."""
        if style == "chat" and self.chat_template:
            after = self._chat(TURN).rpartition(TURN[1]["content"])[2]
            marked = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            special = [i for i in self._ids(after) if i in marked or i in self.tokenizer.all_special_ids]
            if special:
                return special[0]
        return self.tokenizer.eos_token_id

    def _joint(self, style: str) -> tuple[str, str]:
        """(the end of a prompt, the space that an answer begins with after it) of a style."""
        if style == "chat" and self.chat_template:
            end, whole = self._chat(TURN[:1], ask=True), self._chat(TURN)
            space = whole.removeprefix(end).partition(TURN[1]["content"])[0] if whole.startswith(end) else ""
            return end, space if space.isspace() else ""
        return {"qa": ("Answer:", " "), "qa_space": ("Answer: ", "")}.get(style, ("?", " "))

    def prompt(self, text: str, style: str | None = None, earlier: tuple[tuple[str, str], ...] = ()) -> list[int]:
        """Token ids up to where the answer starts; too long a prompt loses its beginning, and is counted.

        `earlier`: (prompt, answer) pairs that were said before, as turns of the same talk.
        """
        style = style or self.style
        if style == "chat":
            words = [word for pair in earlier for word in pair] + [text]
            turns = [{"role": ("user", "assistant")[i % 2], "content": word} for i, word in enumerate(words)]
            ids = self._ids(self._chat(turns, ask=True))
        elif style in ("qa", "qa_space"):
            said = "".join(f"### Question: {q}\n ### Answer: {a}\n" for q, a in earlier)
            ids = self.start + self._ids(
                f"{said}### Question: {text}\n ### Answer:" + (" " if style == "qa_space" else "")
            )
        else:
            ids = self.start + self._ids("".join(f"{q}\n{a}\n\n" for q, a in earlier) + text)
        if len(ids) > self.max_prompt_tokens:
            self.cut.add(text)
            ids = ids[-self.max_prompt_tokens :]
        return ids

    def answer(self, text: str, style: str | None = None, *, complete: bool = True, limit: int = 0) -> list[int]:
        """Token ids of an answer and the end-of-turn token; a cut answer has no end-of-turn token."""
        style, limit = style or self.style, limit or self.max_answer_tokens
        end, end_ids, space = self._joints[style]
        ids = self._ids_after(end, end_ids, space + text if text else "")
        if not complete or len(ids) >= limit:
            return ids[:limit]
        return ids + [self._end[style]]

    def beginning(self, text: str) -> str:
        """An answer's first `max_answer_tokens` tokens, as text."""
        ids, limit = self._ids(text), self.max_answer_tokens
        return self.tokenizer.decode(ids[:limit]).strip() if len(ids) > limit else text

    def stop_ids(self) -> list[int]:
        """Every token at which generation ends."""
        return sorted({self.tokenizer.eos_token_id, *self._end.values()})


# ------------------------------------------------------------------------------------ the rows of one step
@dataclasses.dataclass(frozen=True)
class Sequence:
    """One prompt and one answer in tokens. `group` numbers its row within the step, over all processes.

    `targets`: what is to follow at each place of the answer, where that is not the answer itself.
    """

    kind: str  # "forget", "random" or "normal"
    group: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    targets: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_sequence(kind: str, group: int, row: Row, formatter: PromptFormatter) -> Sequence:
    """A row with its response in the encoder's own style."""
    answer = formatter.answer(row.response, complete=row.complete)
    return Sequence(kind, group, tuple(formatter.prompt(row.prompt)), tuple(answer))


def stopped(slot: int, prompt: tuple[int, ...], words, style: str, formatter: PromptFormatter) -> Sequence:
    """A harmful prompt with `words` begun after it, each of them to be followed by the end of the turn."""
    return Sequence("random", slot, prompt, tuple(words), tuple(formatter.answer("", style) * len(words)))


def probe_sequences(prompts: list[str], formatter: PromptFormatter) -> list[Sequence]:
    """A few real prompts with short answers, branches among them: enough to tell one layout from another."""
    texts = ("Yes, and this is why.", "It depends on the weather in spring.")
    return [make_sequence("normal", 0, Row(prompt, text), formatter) for prompt in prompts for text in texts]


@functools.lru_cache(maxsize=64)
def _pass_order(count: int, seed: int, stream: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, stream, number]).permutation(count)


def visit(count: int, seed: int, stream: int, place: int) -> int:
    """The row at `place` (0, 1, 2, ...) of an endless stream that is shuffled anew for each pass over `count` rows."""
    return int(_pass_order(count, seed, stream, place // count)[place % count])


FOR_THE_POOL = 32  # rows a source that are answered for the random answers alone


class UnlearnBatchSampler:
    """Which rows a step sees, in which words, with which random answers: a function of seed and step."""

    # names of the random streams; the last four have one a source: 100 + i, 200 + i, ...
    ANSWERS, STYLES, WORDS, BEGUN, TURNS, NORMAL, FIRST, FORGET, EMPTY = 3, 4, 5, 6, 7, 100, 200, 300, 400
    EARLIER_TOKENS = 16  # of the answer that stands in an earlier turn

    def __init__(self, forget: list[list[Row]], normal: list[list[Row]], options):
        self.forget, self.normal, self.options = forget, normal, options
        self.normal_tokens = options.normal_answer_tokens or options.max_answer_tokens
        self.pool: list[tuple[str, bool]] = []  # (answer, complete); filled with the responses
        self.answered: list[list[Row]] = []  # harmful and normal rows with an answer, filled with the responses
        self.normal_count = options.normal_batch_size or options.batch_size
        self.first_count = options.first_token_rows
        if options.normal_weight == 0:
            self.normal_count = self.first_count = 0

    def forget_visits(self, step: int) -> list[tuple[int, int]]:
        """(source, row) pairs: the sources take turns, so that each has the same share, whatever its size."""
        return self._turns(self.forget, step, self.FORGET, self.options.batch_size)

    def empty_visits(self, step: int) -> list[tuple[int, int]]:
        """The same for the further harmful rows with the empty answer alone."""
        rows = self.options.empty_answer_rows if self.options.random_weight > 0 else 0
        return self._turns(self.forget, step, self.EMPTY, rows)

    def normal_visits(self, step: int) -> list[tuple[int, int]]:
        """The same for the normal rows."""
        return self._turns(self.normal, step, self.NORMAL, self.normal_count)

    def first_token_visits(self, step: int) -> list[tuple[int, int]]:
        """The same for the rows of which the first answer token alone is looked at."""
        return self._turns(self.normal, step, self.FIRST, self.first_count)

    def _turns(self, sources: list[list[Row]], step: int, stream: int, count: int) -> list[tuple[int, int]]:
        visits = []
        for place in range(step * count, (step + 1) * count):
            source, turn = place % len(sources), place // len(sources)
            visits.append((source, visit(len(sources[source]), self.options.seed, stream + source, turn)))
        return visits

    def rows_to_visit(self) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
        """(source, row) pairs of the harmful and of the normal rows that are visited with an answer."""
        steps = range(self.options.max_unlearn_steps)
        return tuple({v for step in steps for v in visits(step)} for visits in (self.forget_visits, self.normal_visits))

    def trained_prompts(self, steps: int) -> set[str]:
        """The forget prompts that the first `steps` steps ask."""
        visits = (v for step in range(steps) for v in self.forget_visits(step) + self.empty_visits(step))
        return {self.forget[source][row].prompt for source, row in visits}

    def fill_responses(self, answer) -> None:
        """Give every row that the run will visit a response: `answer(rows, tokens) -> rows` asks the model where
        one lacks, for an answer of at most so many tokens."""
        limits = (self.options.max_answer_tokens, self.normal_tokens)
        for sources, visited, tokens in zip((self.forget, self.normal), self.rows_to_visit(), limits, strict=True):
            pairs = sorted(visited)
            if not pairs and self.options.random_weight > 0 and len(self._given()) < self.options.num_random_answers:
                # no KL, but the random answers come from here
                pairs = [(s, i) for s, source in enumerate(sources) for i in range(min(len(source), FOR_THE_POOL))]
            for (s, i), row in zip(pairs, answer([sources[s][i] for s, i in pairs], tokens), strict=True):
                sources[s][i] = row
        self.answered = [
            sorted({row.prompt: row for row in side if row.response}.values(), key=lambda row: row.prompt)
            for side in ([row for source in sources for row in source] for sources in (self.forget, self.normal))
        ]
        self.answered = [side for side in self.answered if side]
        if self.options.random_weight > 0:
            self._make_pool()

    def _given(self) -> list[str]:
        """The true answers that came with the normal rows, each once."""
        return list(dict.fromkeys(a for source in self.normal for row in source for a in row.true_answers))

    def _make_pool(self) -> None:
        """The random answers: true ones that came with the normal rows; the model's own where fewer than K came."""
        rows = [row for source in self.normal for row in source]
        self.pool = [(answer, True) for answer in self._given()]
        if len(self.pool) < max(self.options.num_random_answers, 1):
            own = {row.response: row.complete for row in rows if row.response and not row.true_answers}
            self.pool += list(own.items())
        if len(self.pool) < self.options.num_random_answers:
            raise UsageError(
                f"--num_random_answers {self.options.num_random_answers}: the normal data holds only {len(self.pool)} "
                f"different answers; lower it or add normal rows"
            )

    def ask(
        self, prompt: str, step: int, stream: int, slot: int, formatter: PromptFormatter
    ) -> tuple[tuple[int, ...], str]:
        """(prompt tokens, style) of one visit: a share of the visits in other words, in another template, as the
        second turn of a talk."""
        rng = np.random.default_rng([self.options.seed, self.WORDS, stream, step, slot])
        if rng.random() < self.options.rephrase_share:
            prompt = paraphrase(prompt, rng)
        rng = np.random.default_rng([self.options.seed, self.STYLES, stream, step, slot])
        style = formatter.style
        if rng.random() < self.options.other_template_share:
            others = [other for other in TRAINED_STYLES if other != style]
            style = others[rng.integers(len(others))]
        rng = np.random.default_rng([self.options.seed, self.TURNS, stream, step, slot])
        talks = self.answered and rng.random() < self.options.earlier_turn_share
        earlier = (self.earlier_turn(rng, formatter),) if talks else ()
        return tuple(formatter.prompt(prompt, style, earlier)), style

    def earlier_turn(self, rng: np.random.Generator, formatter: PromptFormatter) -> tuple[str, str]:
        """(prompt, beginning of its answer) of any row, harmful or normal alike: it tells nothing of the next turn."""
        side = self.answered[rng.integers(len(self.answered))]
        row = side[rng.integers(len(side))]
        words = formatter.answer(row.response, complete=False, limit=self.EARLIER_TOKENS)
        return row.prompt, formatter.tokenizer.decode(words, skip_special_tokens=True).strip()

    def random_answers(self, step: int, slot: int) -> list[tuple[str, bool]]:
        """K different answers for one harmful row of one step; a share of them empty where asked for."""
        count = self.options.num_random_answers
        empty = round(count * self.options.empty_answer_share)
        rng = np.random.default_rng([self.options.seed, self.ANSWERS, step, slot])
        drawn = [self.pool[i] for i in rng.choice(len(self.pool), size=count - empty, replace=False)]
        return drawn + [("", True)] * empty

    def begun(
        self, row: Row, style: str, stream: int, step: int, slot: int, formatter: PromptFormatter
    ) -> tuple[int, ...]:
        """The first --begun_answer_tokens of an answer to `row`: of its own, where it has one, or of any row's.

        Harmful and normal rows are begun alike, so that the words tell nothing of what the prompt asks for.
        """
        rng = np.random.default_rng([self.options.seed, self.BEGUN, stream, step, slot])
        side = self.answered[rng.integers(len(self.answered))]
        text = row.response if row.response and rng.random() < 0.5 else side[rng.integers(len(side))].response
        words = formatter.answer(text, style, complete=False)[: self.options.begun_answer_tokens]
        return tuple(words or formatter.answer("", style))

    def sequences(self, step: int, formatter: PromptFormatter) -> list[Sequence]:
        """Every sequence of a step, over all processes: harmful rows with their random answers, then normal rows."""
        out = []
        for slot, (source, index) in enumerate(self.forget_visits(step)):
            row = self.forget[source][index]
            prompt, style = self.ask(row.prompt, step, self.FORGET, slot, formatter)
            if row.response:  # a model that is silent already is not to be pushed away from silence
                answer = formatter.answer(row.response, style, complete=row.complete)
                out.append(Sequence("forget", slot, prompt, tuple(answer)))
                if self.options.random_weight > 0 and self.options.begun_answer_tokens:
                    out.append(stopped(slot, prompt, answer, style, formatter))
            if self.options.random_weight > 0:
                for text, complete in self.random_answers(step, slot):
                    answer = formatter.answer(text, style, complete=complete)
                    out.append(Sequence("random", slot, prompt, tuple(answer)))
        for slot, (source, index) in enumerate(self.empty_visits(step), self.options.batch_size):
            row = self.forget[source][index]
            prompt, style = self.ask(row.prompt, step, self.FORGET, slot, formatter)
            out.append(Sequence("random", slot, prompt, tuple(formatter.answer("", style))))
            if self.options.begun_answer_tokens:
                words = self.begun(row, style, self.FORGET, step, slot, formatter)
                out.append(stopped(slot, prompt, words, style, formatter))
        for slot, (source, index) in enumerate(self.normal_visits(step)):
            row = self.normal[source][index]
            prompt, style = self.ask(row.prompt, step, self.NORMAL, slot, formatter)
            answer = formatter.answer(row.response, style, complete=row.complete, limit=self.normal_tokens)
            out.append(Sequence("normal", slot, prompt, tuple(answer)))
        for slot, (source, index) in enumerate(self.first_token_visits(step), self.normal_count):
            row = self.normal[source][index]
            prompt, style = self.ask(row.prompt, step, self.NORMAL, slot, formatter)
            if self.options.begun_answer_tokens:
                words = self.begun(row, style, self.NORMAL, step, slot, formatter)
            else:  # the KL at the first place does not depend on which token follows: any one will do
                words = tuple(formatter.answer("", style))
            out.append(Sequence("normal", slot, prompt, words))
        return out
