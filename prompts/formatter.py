"""PromptFormatter: prompts and answers as token ids, in a model's own chat template or a plain one."""

from __future__ import annotations

import datetime
import re

from prompts.windows import Passage
from sources.rows import Row
from utils import UsageError, context_length

OTHER_STYLES = ("qa", "qa_space", "raw")
DAY = datetime.date(2024, 7, 26)  # the default date of Llama 3's templates
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
        plain = self._ids("a")
        with_special = tokenizer("a")["input_ids"]
        # the tokens that the tokenizer puts before a text (OPT: </s>); empty if there are none
        self.start = with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []
        bos = tokenizer.bos_token_id
        # what a passage of text begins with, if the model has such a token
        self.text_start = self.start or ([] if bos is None else [bos])
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
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

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

    def prompt_of(self, row: Row, style: str | None = None, earlier: tuple[tuple[str, str], ...] = ()) -> list[int]:
        """Return the token ids of a row up to the start of its answer (`prompt`).

        Of a passage: the start of a text and the tokens that it shows; without either, its first token.
        """
        if isinstance(row, Passage):
            shown, _ = row.prompt_and_answer(bool(self.text_start))
            return [*self.text_start, *shown[-max(1, self.max_prompt_tokens - len(self.text_start)) :]]
        return self.prompt(row.prompt, style, earlier)

    def answer_of(self, row: Row, style: str | None = None, limit: int = 0) -> list[int]:
        """Return the token ids of a row's response (`answer`).

        Of a passage: all tokens after its prompt, whatever the limit, since --text_window has set its length. No
        end-of-turn follows: a text goes on after a passage, and where it ends nobody's turn does.
        """
        if isinstance(row, Passage):
            return list(row.prompt_and_answer(bool(self.text_start))[1])
        return self.answer(row.response, style, complete=row.complete, limit=limit)

    def answer(self, text: str, style: str | None = None, *, complete: bool = True, limit: int = 0) -> list[int]:
        """Return the token ids of an answer with the end-of-turn token; a truncated answer has none."""
        style, limit = style or self.style, limit or self.max_answer_tokens
        end, end_ids, space = self._joints[style]
        ids = self._ids_after(end, end_ids, space + text if text else "")
        if not complete or len(ids) >= limit:
            return ids[:limit]
        return ids + [self._end[style]]

    def count_cut(self, rows: list[Row], answer_tokens: int) -> tuple[int, int]:
        """Return how many (prompts, answers) are longer than the limits; an answer may have `answer_tokens` tokens."""
        long_prompts = [row for row in rows if len(row.prompt.encode()) > self.max_prompt_tokens - 200]
        long_answers = [row for row in rows if row.response and len(row.response.encode()) >= answer_tokens]
        prompts = sum(len(self.prompt_of(row)) >= self.max_prompt_tokens for row in long_prompts)
        return prompts, sum(len(self._ids(row.response)) >= answer_tokens for row in long_answers)

    def beginning(self, text: str) -> str:
        """Return the first `max_answer_tokens` tokens of an answer, as text."""
        ids, limit = self._ids(text), self.max_answer_tokens
        return self.tokenizer.decode(ids[:limit]).strip() if len(ids) > limit else text

    def stop_ids(self) -> list[int]:
        """Return every token that ends generation."""
        return sorted({self.tokenizer.eos_token_id, *self._end.values()})
