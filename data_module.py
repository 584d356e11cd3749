"""Rows -> splits -> tokens -> the sequences that the draws of a step ask for.

Everything here is a pure function of the rows, the seed and the step number: no draw depends on how many processes
run, on what was drawn before, or on when a run was resumed.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re

import numpy as np

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


# --------------------------------------------------------------------------------------------- sequences
@dataclasses.dataclass(frozen=True)
class Sequence:
    """One prompt and one continuation in tokens.

    `draw`: name of the draw that made it. `example_id`: number of its row within the step and its side, over all
    processes. `targets`: what is to follow at each place, where that is not the continuation itself.
    """

    draw: str
    example_id: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    targets: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_sequence(draw: str, example_id: int, row: Row, formatter: PromptFormatter) -> Sequence:
    """Put a row and its response into tokens, in the formatter's own style."""
    answer = formatter.answer(row.response, complete=row.complete)
    return Sequence(draw, example_id, tuple(formatter.prompt(row.prompt)), tuple(answer))


def with_end(prefix: tuple[int, ...], end: int) -> tuple[int, ...]:
    """A prefix and one token more, so that what is to follow its last token is looked at as well."""
    return prefix if prefix and prefix[-1] == end else (*prefix, end)


def make_eot_sequence(draw: str, example_id: int, prompt: tuple[int, ...], prefix, end: int) -> Sequence:
    """A prompt with the tokens of `prefix` after it. After the prompt and after each of these tokens, the target is the
    end of the turn."""
    answer = with_end(tuple(prefix), end)
    return Sequence(draw, example_id, prompt, answer, (end,) * len(answer))


def probe_sequences(prompts: list[str], formatter: PromptFormatter) -> list[Sequence]:
    """A few real prompts with short answers, branches among them: enough to tell one layout from another."""
    texts = ("Yes, and this is why.", "It depends on the weather in spring.")
    return [make_sequence("probe", 0, Row(prompt, text), formatter) for prompt in prompts for text in texts]
