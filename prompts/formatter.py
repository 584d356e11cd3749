"""PromptFormatter: prompts and answers as token ids, in a model's own chat template or a plain one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from prompts.chat_template import ChatTemplate, Turn, read_template_args
from prompts.cutting import CutCounts, count_cut, cut_turns
from prompts.end_tokens import read_end_tokens
from prompts.thoughts import without_thoughts
from prompts.tokenizer import pad_with_end
from prompts.windows import Passage
from sources.rows import Row
from utils import UsageError, context_length, log

OTHER_STYLES = ("qa", "qa_space", "raw")
TRAINED_STYLES = ("qa", "qa_space", "qa_space", "raw")  # people often paste the prompt with its space
MOST_KNOWN = 50_000  # texts whose tokens are kept: about 50 MB
BEGINNING = 24  # tokens at the end of a prompt in which a thought that it opens is looked for


class PromptFormatter:
    """Formatter of prompts and answers as tokens. A prompt's tokens do not depend on its answer.

    Styles: `chat`: the tokenizer's own template. `qa`: the published template; the prompt ends with "Answer:" and the
    answer begins with a space. `qa_space`: the same with the space at the end of the prompt, as people often paste it.
    `raw`: the bare prompt. Earlier turns and the system message stand before the prompt in every style.

    A chat prompt has two ends. Rows hold answers, not thoughts. So the prompt that an answer follows (in training, in
    all scores of given answers, for a model's own answers and the evaluations during a run) goes on to where the answer
    begins: past the empty think block or channel header that the template writes there, and past the end of a thought
    that the generation prompt opens. With `ask`, it is the generation prompt as the template gives it: so users ask,
    and so do the final evaluation and its attacks. `read_answer` then leaves out what the model thought.
    """

    def __init__(
        self, tokenizer, template: str, max_prompt_tokens: int, max_answer_tokens: int, *, ends=(),
        template_args: dict | None = None, system: str | None = None,
    ):  # fmt: skip
        """`ends`: tokens that end an answer, beside those that tokenizer and template name."""
        self.chat = ChatTemplate(tokenizer, template_args)
        self.tokenizer, self.system = tokenizer, system
        self.style = template if template != "auto" else ("chat" if self.chat_template else "qa")
        if self.style == "chat" and not self.chat_template:
            raise UsageError("--template chat: this model's tokenizer has no chat template; use auto, qa or raw")
        self._check_chat(template_args)
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = self.longest_answer = max_answer_tokens
        self.cut: set[str] = set()  # prompts that were too long
        self.unfinished_thoughts = 0  # answers read so far that are only an unfinished thought
        self._beyond: dict[int, str] = {}  # tokens past the model's embedding, set by `fit`
        self._known: dict[str, tuple[int, ...]] = {}  # texts in tokens
        plain = self.ids("a")
        with_special = tokenizer("a")["input_ids"]
        # the tokens that the tokenizer puts before a text (OPT: </s>); empty if there are none
        self.start = with_special[: len(with_special) - len(plain)] if with_special[-len(plain) :] == plain else []
        bos = tokenizer.bos_token_id
        # what a passage of text begins with, if the model has such a token
        self.text_start = self.start or ([] if bos is None else [bos])
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        self._ends = set(ends)
        self._end = {style: self._end_of_turn(style) for style in ("chat", *OTHER_STYLES)}
        joints = {style: self._joint(style) for style in self._end}
        self._joints = {style: (end, self.ids(end), space) for style, (end, space) in joints.items()}

    @classmethod
    def of(cls, tokenizer, name: str, options, max_answer_tokens: int, template: str | None = None) -> PromptFormatter:
        """Return the formatter of the model in a folder or hub name, as the options ask. Raises UsageError."""
        return cls(
            tokenizer, template or options.template, options.max_prompt_tokens, max_answer_tokens,
            ends=read_end_tokens(name), template_args=read_template_args(options.template_args), system=options.system,
        )  # fmt: skip

    @property
    def chat_template(self) -> str:
        """The text of the chat template, "" if there is none."""
        return self.chat.text

    def _check_chat(self, template_args: dict | None) -> None:
        """Raise UsageError if the chat template cannot be used as the options ask."""
        if self.chat_template:
            try:
                self.chat.check()
            except UsageError:
                if self.style == "chat":
                    raise
                self.chat.text = ""  # the style is another one; nothing is asked in this template
        if self.style != "chat":
            if template_args:
                raise UsageError(f"--template_args: --template {self.style} reads none; use chat")
        elif self.system and not self.chat.takes_system:
            raise UsageError("--system: this model's chat template takes no system message; leave the option out, or "
                             "write the text into the prompts")  # fmt: skip

    def fit(self, config, answer_tokens: int) -> None:
        """Lower the prompt limit so that prompt and answer fit the model's context. UsageError if they cannot, or if
        the prompts need tokens that the model's embedding does not have."""
        self._check_vocabulary(getattr(config.get_text_config(), "vocab_size", None))
        self.longest_answer = answer_tokens
        context = context_length(config)
        if context and context < answer_tokens + 16:
            raise UsageError(f"answers of {answer_tokens} tokens leave no room in the model's context of {context}: "
                             "lower --max_answer_tokens (or --max_new_tokens)")  # fmt: skip
        if context:
            self.max_prompt_tokens = min(self.max_prompt_tokens, context - answer_tokens)
        if (frame := len(self.full_prompt(Row("")))) >= self.max_prompt_tokens:
            raise UsageError(f"--max_prompt_tokens {self.max_prompt_tokens}: the template around a prompt and --system "
                             f"take {frame} tokens alone; raise it")  # fmt: skip

    def _check_vocabulary(self, size: int | None) -> None:
        """Raise UsageError if the prompts use tokens past the embedding's `size` rows; warn of those that none uses."""
        beyond = {i: token for token, i in self.tokenizer.get_vocab().items() if size and i >= size}
        if not beyond:
            return
        used = {*self.start, self._end[self.style], *self.full_prompt(Row("a"))} & beyond.keys()
        named = ", ".join(f"{beyond[i]!r} ({i})" for i in sorted(used or beyond)[:4])
        name = self.tokenizer.name_or_path
        if used:
            raise UsageError(f"{name}: its prompts need tokens that the model's embedding of {size} rows does not "
                             f"have: {named}; save the model after model.resize_token_embeddings("
                             f"{len(self.tokenizer)}), or take another --template")  # fmt: skip
        log.warning("%s: its tokenizer has %d tokens that the model's embedding of %d rows does not have: %s; the "
                    "prompts do not use them", name, len(beyond), size, named)  # fmt: skip
        if self.tokenizer.pad_token_id in beyond:
            pad_with_end(self.tokenizer)
        if self.style != "chat" and {self._end["chat"], *self._joints["chat"][1]} & beyond.keys():
            self.chat.text, self._end["chat"] = "", self._end[self.style]  # so that nothing else asks in it
        self._ends -= beyond.keys()
        self._beyond = beyond
        self._known.clear()

    # ---- tokens
    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text alone. They are kept: tokenising a step's texts takes as long as a GPU's step.

        Raises UsageError for a token that the embedding does not have.
        """
        ids = self._known.get(text)
        if ids is None:
            ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if self._beyond and (beyond := self._beyond.keys() & set(ids)):
                token = self._beyond[min(beyond)]
                raise UsageError(f"a row holds {token!r}, a token that the model's embedding does not have: "
                                 f"{text[:60]!r}; remove it from the row")  # fmt: skip
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[text] = ids
        return list(ids)

    def _ids_after(self, before: str, before_ids: list[int], text: str) -> list[int]:
        """Return the token ids of `text` as it follows `before`, whose own ids are `before_ids`.

        Some tokenizers (Llama's) put a space before a separate text. The first answer token would then be one that no
        model generates there.
        """
        joined = self.ids(before + text)
        return joined[len(before_ids) :] if joined[: len(before_ids)] == before_ids else self.ids(text)

    def _end_of_turn(self, style: str) -> int:
        """Return the token that ends an answer; in a chat, the first special token after the assistant's text."""
        if style == "chat" and self.chat_template:
            special_ids = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            special_ids |= {*self.tokenizer.all_special_ids, *self._ends}
            special = [i for i in self.ids(self.chat.after_answer) if i in special_ids]
            if special:
                return special[0]
        return self.tokenizer.eos_token_id

    def _joint(self, style: str) -> tuple[str, str]:
        """Return (the text that ends a prompt, the space that the answer after it begins with) of a style."""
        if style == "chat" and self.chat_template:
            return self.chat.before_answer, self.chat.space
        return {"qa": ("Answer:", " "), "qa_space": ("Answer: ", "")}.get(style, ("?", " "))

    # ---- prompts
    def prompt(
        self, text: str, style: str | None = None, earlier: tuple[Turn, ...] = (), *, ask: bool = False
    ) -> list[int]:
        """Return the token ids up to the start of the answer; with `ask`, up to the generation prompt alone.

        `earlier`: (role, text) turns before the prompt. A prompt that is too long is counted and cut inside the text of
        the user: at the beginning of the oldest turn, whole turns first. The system message, the template's markers and
        the end of the last turn stay.
        """
        style, turns = style or self.style, self._turns(earlier)
        ids = self._prompt_ids(turns, text, style, ask)
        if len(ids) > self.max_prompt_tokens:
            self.cut.add(text)
            ids = cut_turns([*turns, ("user", text)], self.max_prompt_tokens, self,
                            lambda shorter: self._prompt_ids(shorter[:-1], shorter[-1][1], style, ask))  # fmt: skip
        return ids

    def full_prompt(self, row: Row) -> list[int]:
        """Return the token ids of a row up to the start of its answer, however many they are."""
        return self._prompt_ids(self._turns(row.earlier), row.prompt, self.style, False)

    def _turns(self, earlier: tuple[Turn, ...]) -> list[Turn]:
        """Return the turns before a prompt, with --system where they have no system message of their own."""
        has_own = not self.system or any(role == "system" for role, _ in earlier)
        return list(earlier) if has_own else [("system", self.system), *earlier]

    def _prompt_ids(self, turns: list[Turn], text: str, style: str, ask: bool) -> list[int]:
        """Return the token ids of a conversation that ends with the user's `text`, of whatever length."""
        if style == "chat":
            return self.ids(self.chat.render([*turns, ("user", text)], ask=True) + ("" if ask else self.chat.lead))
        if style == "raw":
            forms, last = {"user": "{}\n", "assistant": "{}\n\n", "system": "{}\n\n"}, "{}"
        else:
            forms = {"user": "### Question: {}\n", "assistant": " ### Answer: {}\n", "system": "{}\n\n"}
            last = "### Question: {}\n ### Answer:" + (" " if style == "qa_space" else "")
        before = "".join(forms[role].replace("{}", said) for role, said in turns)
        return self.start + self.ids(before + last.replace("{}", text))

    def prompt_of(
        self, row: Row, style: str | None = None, earlier: tuple[Turn, ...] = (), *, ask: bool = False
    ) -> list[int]:
        """Return the token ids of a row up to the start of its answer (`prompt`).

        `earlier`: turns of another conversation, put before those of the row and after its system message. Of a
        passage: the start of a text and the tokens that it shows; without either, its first token.
        """
        if isinstance(row, Passage):
            shown, _ = row.prompt_and_answer(bool(self.text_start))
            return [*self.text_start, *shown[-max(1, self.max_prompt_tokens - len(self.text_start)) :]]
        first = next((i for i, (role, _) in enumerate(row.earlier) if role != "system"), len(row.earlier))
        return self.prompt(row.prompt, style, (*row.earlier[:first], *earlier, *row.earlier[first:]), ask=ask)

    # ---- answers
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

    def tokens_within(self, tokens: list[int], find: Callable[[str], Iterable[tuple[int, int]]]) -> tuple[bool, ...]:
        """Return for each token of an answer whether it holds a part of what `find` finds in the text.

        find: text -> (start, end) in characters.
        """
        ends = [len(self.tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)) for i in range(len(tokens))]
        spans = list(find(self.tokenizer.decode(tokens, skip_special_tokens=True)))
        starts = [0, *ends[:-1]]
        return tuple(any(first < end and start < last for first, last in spans)
                     for start, end in zip(starts, ends, strict=True))  # fmt: skip

    def beginning(self, text: str) -> str:
        """Return the first `max_answer_tokens` tokens of an answer, as text."""
        ids, limit = self.ids(text), self.max_answer_tokens
        return self.tokenizer.decode(ids[:limit]).strip() if len(ids) > limit else text

    def read_answer(self, prompt: list[int], tokens: list[int]) -> str:
        """Return what a model said after a prompt as text, without its thoughts and special tokens.

        An answer that is only an unfinished thought is empty, and is counted in `unfinished_thoughts`.
        """
        markers = self.chat.thoughts
        if markers is None:
            return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        is_open = markers.open_at_end(self.tokenizer.decode(prompt[-BEGINNING:]))
        answer = without_thoughts(self.tokenizer.decode(tokens), markers, is_open=is_open)
        if answer is None:
            self.unfinished_thoughts += 1
            return ""
        return self._special.sub("", answer).strip()

    def warn_of_unfinished_thoughts(self, whose: str, option: str) -> None:
        """Log how many answers read since the last call are only an unfinished thought. `option`: their limit."""
        count, self.unfinished_thoughts = self.unfinished_thoughts, 0
        if count:
            short = "--template_args enable_thinking=false or " if "enable_thinking" in self.chat_template else ""
            log.warning("%s: %d answers are only an unfinished thought and count as empty; pass %sa larger %s",
                        whose, count, short, option)  # fmt: skip

    @property
    def further_ends(self) -> list[int]:
        """The tokens that end an answer and that neither tokenizer nor templates name."""
        return sorted(self._ends - {self.tokenizer.eos_token_id, *self._end.values()})

    def stop_ids(self) -> list[int]:
        """Return every token that ends generation."""
        return sorted({self.tokenizer.eos_token_id, *self._end.values(), *self._ends})

    # ---- rows, before anything is trained
    def count_cut(self, rows: list[Row], answer_tokens: int = 0) -> CutCounts:
        """Return how many prompts and given answers of the rows are cut, in this style.

        answer_tokens: the answers' limit (0: `max_answer_tokens`).
        """
        return count_cut(rows, self, answer_tokens or self.max_answer_tokens)

    def check_turns(self, rows: list[Row]) -> None:
        """Raise UsageError for earlier turns that the chat template refuses, and log what it makes of system messages.

        Each order of roles is tried once: that is what templates refuse.
        """
        if self.style != "chat":
            return
        with_turns = [row for row in rows if row.earlier]
        for row in {tuple(role for role, _ in row.earlier): row for row in with_turns}.values():
            self.chat.render([*row.earlier, ("user", row.prompt)], ask=True)
        moved = sum(any(role == "system" for role, _ in row.earlier) for row in with_turns)
        if moved and not self.chat.takes_system:
            log.warning("%d rows have a system message, which the chat template does not take: it stands before the "
                        "user's first text", moved)  # fmt: skip
