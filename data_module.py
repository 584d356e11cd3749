"""Split rows by prompt, tokenise them, and build the sequences of a step.

Everything here is a pure function of rows, options and tokenizer. The result does not depend on the number of
processes, on earlier draws, or on a resume.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import re

import numpy as np

from sources.rows import Row
from utils import UsageError, context_length, log

TRAINED_ON = "trained_on.json"  # file beside a model: hashes of the forget prompts that its run trained on


# ------------------------------------------------------------------------------------------------ splits
def _same(prompt: str) -> str:
    """Return a prompt without case and spacing. Two prompts that agree in it count as the same."""
    return " ".join(prompt.casefold().split())


def prompt_hash(prompt: str) -> str:
    """Return a hash that names a prompt, so that the model's folder does not contain the forget prompts."""
    return hashlib.sha256(_same(prompt).encode()).hexdigest()[:16]


def split_of(prompt: str, seed: int, dev_share: float, test_share: float) -> str:
    """Return 'train', 'dev' or 'test', from prompt, seed and shares: all rows of a prompt share a split."""
    digest = hashlib.sha256(f"{seed}\n{_same(prompt)}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "test" if place < test_share else "dev" if place < test_share + dev_share else "train"


def split_rows(rows: list[Row], seed: int, dev_share: float, test_share: float) -> dict[str, list[Row]]:
    """Return {split: rows}. If no row would be left for training (a source of a few rows), all rows are trained on."""
    parts: dict[str, list[Row]] = {"train": [], "dev": [], "test": []}
    for row in rows:
        parts[split_of(row.prompt, seed, dev_share, test_share)].append(row)
    if not parts["train"]:
        log.warning("only %d rows: all are trained on, none is held out", len(rows))
        parts = {"train": list(rows), "dev": [], "test": []}
    return parts


def split_sources(sources: list[list[Row]], options) -> list[dict[str, list[Row]]]:
    """Split each source by prompt. Training and evaluation both call this, so they hold out the same prompts.

    A prompt that a small source trains on is held out from no other source.
    """
    parts = [split_rows(rows, options.seed, options.dev_share, options.test_share) for rows in sources]
    shares = (options.seed, options.dev_share, options.test_share)
    trained = {_same(row.prompt) for part in parts for row in part["train"] if split_of(row.prompt, *shares) != "train"}
    for part in parts if trained else ():
        for split in ("dev", "test"):
            part["train"] += [row for row in part[split] if _same(row.prompt) in trained]
            part[split] = [row for row in part[split] if _same(row.prompt) not in trained]
    return parts


def refuse_overlap(forget: list[Row], normal: list[Row]) -> None:
    """Raise UsageError, with the prompts, if a prompt is on both sides: it would be forgotten and retained at once."""
    normal_prompts = {_same(row.prompt) for row in normal}
    both = sorted({row.prompt for row in forget if _same(row.prompt) in normal_prompts})
    if both:
        shown = "; ".join(repr(prompt[:60]) for prompt in both[:5]) + (" ..." if len(both) > 5 else "")
        raise UsageError(
            f"{len(both)} prompts are in --forget_data and in --normal_data; remove them from one of the two: {shown}"
        )


def sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """Return at most `count` rows, one a prompt, in an order drawn from the seed."""
    one_a_prompt = list({row.prompt: row for row in rows}.values())
    order = np.random.default_rng([seed, 11]).permutation(len(one_a_prompt))[:count]
    return [one_a_prompt[i] for i in order]


# -------------------------------------------------------------------------------------------- tokenising
OTHER_STYLES = ("qa", "qa_space", "raw")
DAY = datetime.date(2024, 7, 26)  # the default date of Llama 3's templates
MOST_KNOWN = 50_000  # texts whose tokens are kept: about 50 MB
TURN = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]  # probes a chat template
TRAINED_STYLES = ("qa", "qa_space", "qa_space", "raw")  # people often paste the prompt with its space


def default_template(tokenizer) -> str | None:
    """Return the chat template. If the tokenizer has several by name (one may be for tools): the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _without_today(template: str) -> str:
    """Return a chat template with the fixed DAY instead of a call for today's date, as Llama 3's template has it.

    Otherwise prompts would change at midnight: the cached states of the original would no longer fit, and a resumed
    run would differ.
    """
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda match: repr(DAY.strftime(match[2])), template)


class PromptFormatter:
    """Formatter of prompts and answers as tokens. A prompt's tokens do not depend on its answer.

    Styles: `chat`: the tokenizer's own template. `qa`: the published template; the prompt ends with "Answer:" and the
    answer begins with a space. `qa_space`: the same with the space at the end of the prompt, as people often paste it.
    `raw`: the bare prompt.
    """

    def __init__(self, tokenizer, template: str, max_prompt_tokens: int, max_answer_tokens: int):
        self.chat_template = _without_today(default_template(tokenizer) or "")
        if template == "chat" and not self.chat_template:
            raise UsageError("--template chat: this model's tokenizer has no chat template; use auto, qa or raw")
        self.tokenizer = tokenizer
        self.style = template if template != "auto" else ("chat" if self.chat_template else "qa")
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = self.longest_answer = max_answer_tokens
        self.cut: set[str] = set()  # prompts that were truncated on the left
        self._known: dict[str, tuple[int, ...]] = {}  # texts in tokens
        plain = self._ids("a")
        with_special = tokenizer("a")["input_ids"]
        # the tokens that the tokenizer puts before a text (OPT: </s>); empty if there are none
        self.start = with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []
        self._end = {style: self._end_of_turn(style) for style in ("chat", *OTHER_STYLES)}
        joints = {style: self._joint(style) for style in self._end}
        self._joints = {style: (end, self._ids(end), space) for style, (end, space) in joints.items()}

    def fit(self, config, answer_tokens: int) -> None:
        """Lower the prompt limit so that prompt and answer fit the model's context. UsageError if they cannot."""
        self.longest_answer = answer_tokens
        context = context_length(config)
        if context and context < answer_tokens + 16:
            raise UsageError(f"answers of {answer_tokens} tokens leave no room in the model's context of {context}: "
                             "lower --max_answer_tokens (or --max_new_tokens)")  # fmt: skip
        if context:
            self.max_prompt_tokens = min(self.max_prompt_tokens, context - answer_tokens)

    def _chat(self, turns: list[dict], ask: bool = False) -> str:
        """Return turns as text in the tokenizer's own template; with `ask`, up to the start of the next answer."""
        return self.tokenizer.apply_chat_template(turns, chat_template=self.chat_template, tokenize=False,
                                                  add_generation_prompt=ask)  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        """Return the token ids of a text. They are kept, as tokenising a step's texts takes as long as a GPU's step."""
        ids = self._known.get(text)
        if ids is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            ids = self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(ids)

    def _ids_after(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Return the token ids of `text` as it follows `before`, whose own ids are `before_ids`.

        Some tokenizers (Llama's) put a space before a separate text. The first answer token would then be one that no
        model generates there.
        """
        joined = self._ids(before + text)
        return joined[len(before_ids) :] if joined[: len(before_ids)] == before_ids else self._ids(text)

    def _end_of_turn(self, style: str) -> int:
        """Return the token that ends an answer; in a chat, the first special token after the assistant's text."""
        if style == "chat" and self.chat_template:
            after = self._chat(TURN).rpartition(TURN[1]["content"])[2]
            special_ids = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            special = [i for i in self._ids(after) if i in special_ids or i in self.tokenizer.all_special_ids]
            if special:
                return special[0]
        return self.tokenizer.eos_token_id

    def _joint(self, style: str) -> tuple[str, str]:
        """Return (the text that ends a prompt, the space that the answer after it begins with) of a style."""
        if style == "chat" and self.chat_template:
            end, talk = self._chat(TURN[:1], ask=True), self._chat(TURN)
            space = talk.removeprefix(end).partition(TURN[1]["content"])[0] if talk.startswith(end) else ""
            return end, space if space.isspace() else ""
        return {"qa": ("Answer:", " "), "qa_space": ("Answer: ", "")}.get(style, ("?", " "))

    def prompt(self, text: str, style: str | None = None, earlier: tuple[tuple[str, str], ...] = ()) -> list[int]:
        """Return the token ids up to the start of the answer. A prompt that is too long is truncated left and counted.

        `earlier`: (prompt, answer) pairs, the earlier turns of the same conversation.
        """
        style = style or self.style
        if style == "chat":
            messages = [message for pair in earlier for message in pair] + [text]
            turns = [{"role": ("user", "assistant")[i % 2], "content": message} for i, message in enumerate(messages)]
            ids = self._ids(self._chat(turns, ask=True))
        elif style in ("qa", "qa_space"):
            before = "".join(f"### Question: {q}\n ### Answer: {a}\n" for q, a in earlier)
            ids = self.start + self._ids(
                f"{before}### Question: {text}\n ### Answer:" + (" " if style == "qa_space" else "")
            )
        else:
            ids = self.start + self._ids("".join(f"{q}\n{a}\n\n" for q, a in earlier) + text)
        if len(ids) > self.max_prompt_tokens:
            self.cut.add(text)
            ids = ids[-self.max_prompt_tokens :]
        return ids

    def answer(self, text: str, style: str | None = None, *, complete: bool = True, limit: int = 0) -> list[int]:
        """Return the token ids of an answer with the end-of-turn token; a truncated answer has none."""
        style, limit = style or self.style, limit or self.max_answer_tokens
        end, end_ids, space = self._joints[style]
        ids = self._ids_after(end, end_ids, space + text if text else "")
        if not complete or len(ids) >= limit:
            return ids[:limit]
        return ids + [self._end[style]]

    def beginning(self, text: str) -> str:
        """Return the first `max_answer_tokens` tokens of an answer, as text."""
        ids, limit = self._ids(text), self.max_answer_tokens
        return self.tokenizer.decode(ids[:limit]).strip() if len(ids) > limit else text

    def stop_ids(self) -> list[int]:
        """Return every token that ends generation."""
        return sorted({self.tokenizer.eos_token_id, *self._end.values()})


# --------------------------------------------------------------------------------------------- sequences
@dataclasses.dataclass(frozen=True)
class Sequence:
    """One prompt and one continuation in tokens.

    `draw`: name of the draw that made it. `example_id`: number of its row within the step and side, over all
    processes. `targets`: the target at each place of the continuation, if it is not the continuation's own token.
    """

    draw: str
    example_id: int
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    targets: tuple[int, ...] | None = None

    @property
    def length(self) -> int:
        """Number of tokens of prompt and continuation."""
        return len(self.prompt_ids) + len(self.answer_ids)


def make_sequence(draw: str, example_id: int, row: Row, formatter: PromptFormatter) -> Sequence:
    """Return a row and its response as a Sequence, in the formatter's own style."""
    answer = formatter.answer(row.response, complete=row.complete)
    return Sequence(draw, example_id, tuple(formatter.prompt(row.prompt)), tuple(answer))


def with_end(prefix: tuple[int, ...], end: int) -> tuple[int, ...]:
    """Return a prefix with the token `end` after it, so that the last prefix token has a target too."""
    return prefix if prefix and prefix[-1] == end else (*prefix, end)


def make_eot_sequence(draw: str, example_id: int, prompt: tuple[int, ...], prefix, end: int) -> Sequence:
    """Return a prompt with a prefilled answer `prefix`. The target is end-of-turn after the prompt and after each
    prefix token."""
    answer = with_end(tuple(prefix), end)
    return Sequence(draw, example_id, prompt, answer, (end,) * len(answer))


def probe_sequences(prompts: list[str], formatter: PromptFormatter) -> list[Sequence]:
    """Return a few real prompts with two short answers each, so that trees branch: `check_packing` compares layouts."""
    texts = ("Yes, and this is why.", "It depends on the weather in spring.")
    return [make_sequence("probe", 0, Row(prompt, text), formatter) for prompt in prompts for text in texts]
