"""ChatTemplate: what a tokenizer's chat template writes around a conversation, found by asking it."""

from __future__ import annotations

import datetime
import functools
import re

import yaml

from prompts.thoughts import Markers, markers_of
from utils import UsageError

Turn = tuple[str, str]  # (system, user or assistant; its text)
DAY = datetime.date(2024, 7, 26)  # the default date of Llama 3's templates
QUESTION, ANSWER, SYSTEM = "Q", "ANSWER", "SYSTEM"  # texts that probe a template
GIVEN = {"messages", "conversation", "add_generation_prompt", "chat_template", "tokenize"}  # are not the user's to set


def default_template(tokenizer) -> str | None:
    """Return the chat template. If the tokenizer has several by name (one may be for tools): the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def read_template_args(words: list[str]) -> dict:
    """Return --template_args NAME=VALUE ... as a dict; each value is read as YAML. Raises UsageError."""
    args = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name.isidentifier() or name in GIVEN:
            raise UsageError(f"--template_args {word}: must look like enable_thinking=false")
        try:
            args[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--template_args {word}: {value!r} is not a value") from error
    return args


def _without_today(template: str) -> str:
    """Return a chat template with the fixed DAY instead of a call for today's date, as Llama 3's template has it.

    Otherwise prompts would change at midnight: the cached states of the original would no longer fit, and a resumed
    run would differ.
    """
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda match: repr(DAY.strftime(match[2])), template)


class ChatTemplate:
    """A tokenizer's chat template with the user's arguments.

    `text`: the template itself, "" if there is none. `lead`: what stands between the generation prompt and an answer
    that is not thought about: a think block or channel header that the template writes there, or the end of a thought
    that the generation prompt opens. `space`: the space that an answer begins with. `thoughts`: the markers of this
    model's thoughts, or None.
    """

    def __init__(self, tokenizer, args: dict | None = None):
        self.tokenizer, self.args = tokenizer, args or {}
        self.text = _without_today(default_template(tokenizer) or "")
        self.thoughts: Markers | None = markers_of(self.text, tokenizer)
        self._in_parts = False
        unread = [name for name in self.args if not re.search(rf"\b{name}\b", self.text)]
        if unread:
            reason = "no such argument" if self.text else "no text, since this model's tokenizer has none"
            raise UsageError(f"--template_args {unread[0]}: the chat template has {reason}")

    def check(self) -> None:
        """Choose the form of the turns that the template reads. Raises UsageError if it can write neither form.

        Templates of some models with a vision tower read a turn as a list of parts, and write nothing of a plain text.
        """
        for self._in_parts in (False, True):
            try:
                if ANSWER in self._render([("user", QUESTION), ("assistant", ANSWER)]):
                    return
                reason = "it writes no answer"
            except Exception as error:  # of jinja, or of the template's own code
                reason = _one_line(error)
        raise UsageError(f"--template chat: the chat template cannot write a conversation ({reason}); use qa or raw")

    def render(self, turns: list[Turn], ask: bool = False) -> str:
        """Return a conversation as text; with `ask`, up to the generation prompt. Raises UsageError if refused."""
        try:
            return self._render(self._allowed(turns), ask)
        except Exception as error:  # of jinja, or of the template's own code
            roles = ", ".join(role for role, _ in turns)
            raise UsageError(f"the chat template refuses the turns {roles} of the row {turns[-1][1][:60]!r} "
                             f"({_one_line(error)}); change the row, or pass --template qa") from error  # fmt: skip

    def _render(self, turns: list[Turn], ask: bool = False) -> str:
        messages = [{"role": role, "content": [{"type": "text", "text": text}] if self._in_parts else text}
                    for role, text in turns]  # fmt: skip
        return self.tokenizer.apply_chat_template(messages, chat_template=self.text, tokenize=False,
                                                  add_generation_prompt=ask, **self.args)  # fmt: skip

    def _allowed(self, turns: list[Turn]) -> list[Turn]:
        """Return the turns as the template takes them.

        A system message that it does not take goes before the user's text that follows it, and neighbouring turns of
        one role are joined where roles must alternate.
        """
        allowed: list[Turn] = []
        pending = ""  # system messages that have no place of their own
        for role, text in turns:
            if role == "system" and not (self.takes_system and (not allowed or not self.alternates)):
                pending += f"{text}\n\n"
                continue
            if role == "user":
                text, pending = pending + text, ""
            if self.alternates and allowed and allowed[-1][0] == role:
                allowed[-1] = (role, f"{allowed[-1][1]}\n\n{text}")
            else:
                allowed.append((role, text))
        return allowed

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether the template writes a system message."""
        return self._writes([("system", SYSTEM), ("user", QUESTION)], SYSTEM)

    @functools.cached_property
    def alternates(self) -> bool:
        """Whether user and assistant must take turns."""
        return not self._writes([("user", QUESTION), ("user", ANSWER)], ANSWER)

    def _writes(self, turns: list[Turn], text: str) -> bool:
        try:
            return text in self._render(turns, ask=True)
        except Exception:  # how templates say that they do not take these turns
            return False

    @functools.cached_property
    def _around_answer(self) -> tuple[str, str, str, str]:
        """Return (generation prompt, lead, space, what follows the answer) of a short conversation."""
        prompt = self._render([("user", QUESTION)], ask=True)
        before, _, after = self._render([("user", QUESTION), ("assistant", ANSWER)]).rpartition(ANSWER)
        if before.startswith(prompt):
            between = before[len(prompt) :]
            lead = "" if between.isspace() else between.rstrip(" ")
            return prompt, lead, between[len(lead) :], after
        if self.thoughts and self.thoughts.open_at_end(prompt):
            return prompt, self.thoughts.closing(prompt, before), "", after
        return prompt, "", "", after

    @property
    def before_answer(self) -> str:
        """The text up to an answer of a short conversation: generation prompt and lead."""
        return self._around_answer[0] + self.lead

    @property
    def lead(self) -> str:
        return self._around_answer[1]

    @property
    def space(self) -> str:
        return self._around_answer[2]

    @property
    def after_answer(self) -> str:
        """What the template writes after the last answer."""
        return self._around_answer[3]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__
