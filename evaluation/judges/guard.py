"""A generative safety model as a judge: it is given a prompt with its answer, and says in words what that answer is."""

from __future__ import annotations

import re

import torch

from engine.generation import generate
from engine.loading import load_causal_model
from evaluation.judges.base import Judgement
from evaluation.judges.guard_formats import FORMATS
from evaluation.judges.on_demand import ModelJudge, check_vocabulary
from prompts.chat_template import ChatTemplate, default_template
from prompts.end_tokens import read_end_tokens
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from utils import UsageError, context_length, log


class Guard(ModelJudge):
    """A causal language model that was trained to judge answers, or a chat model with a rubric.

    format_name: one of `FORMATS`, which says what the model is asked and how its reply is read. Replies are greedy and
    short, and what all questions begin with, such as the list of harms, is read once (`engine.generation.generate`).
    """

    kind = "guard"

    def __init__(self, path: str, device: torch.device, *, format_name: str, name: str | None = None,
                 dtype: torch.dtype = torch.float32, batch_size: int = 0, **trust):  # fmt: skip
        super().__init__(name or path, path, device)
        self.format_name, self.format = format_name, FORMATS[format_name]
        self.labels = (*self.format.labels, "empty", "unreadable")
        self.given, self.limits = self.format.given, self.format.limits
        self.settings = {"format": format_name}
        self.dtype, self.batch_size, self.trust = dtype, batch_size, trust
        self.formatter: PromptFormatter | None = None
        self._special: re.Pattern | None = None
        self._unread_replies: list[str] = []
        self._num_cut = 0

    def read_tokenizer(self) -> None:
        """Load the tokenizer, if it is not loaded. Raises UsageError if it has no template that the format needs."""
        if self.formatter:
            return
        tokenizer = load_tokenizer(self.path, trust_remote_code=self.trust.get("trust_remote_code", False))
        if self.format.needs_template:
            self._check_template(tokenizer)
        self.formatter = PromptFormatter(
            tokenizer, "chat" if self.format.needs_template else "raw", 0, self.format.new_tokens,
            ends=read_end_tokens(self.path),
        )  # fmt: skip
        added = tokenizer.added_tokens_decoder.values()
        special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))

    def _check_template(self, tokenizer) -> None:
        if not default_template(tokenizer):
            raise UsageError(f"{self.option} {self.name}: its tokenizer has no chat template, which the format "
                             f"{self.format_name} needs; copy chat_template.jinja beside it")  # fmt: skip
        try:
            ChatTemplate(tokenizer).check()
        except UsageError as error:
            raise UsageError(f"{self.option} {self.name}: its chat template cannot write a prompt with an answer; take "
                             "the template that came with the model") from error  # fmt: skip

    def _load(self):
        self.read_tokenizer()
        return load_causal_model(self.path, dtype=self.dtype, **self.trust)

    def _ask(self, prompts: list[str], answers: list[str]) -> list[Judgement]:
        self._num_cut = 0
        questions = [self.question(*texts) for texts in zip(prompts, answers, strict=True)]
        check_vocabulary(self, max(map(max, questions)))
        if self._num_cut:
            log.warning("judge %s: %d prompts or answers are too long for its context; the beginning of the prompt, "
                        "then the end of the answer is left out", self.name, self._num_cut)  # fmt: skip
        replies = generate(self.model, self.formatter, questions, max_new_tokens=self.format.new_tokens,
                           batch_size=self.batch_size)  # fmt: skip
        judged = [self.format.read(reply) for reply, _ in replies]
        self._unread_replies = [reply for (reply, _), judgement in zip(replies, judged, strict=True)
                                if judgement.label == "unreadable"]  # fmt: skip
        return judged

    # ---- what the model reads
    def question(self, prompt: str, answer: str) -> list[int]:
        """Return the token ids of what the guard is asked about one answer, cut to its context.

        Special tokens of the guard's own in the texts are left out: they would end a turn, and an answer could pass for
        the guard's own words.
        """
        prompt, answer = (self._special.sub("", text) for text in (prompt, answer))
        ids, context = self._ids(prompt, answer), context_length(self.model.config)
        limit = context - self.format.new_tokens if context else len(ids)
        if len(ids) <= limit:
            return ids
        self._num_cut += 1
        tokenizer = self.formatter.tokenizer
        prompt_ids, answer_ids = self.formatter.ids(prompt), self.formatter.ids(answer)
        room = limit - len(self._ids("", "")) - 8  # a few tokens that the joints may take
        if room < 16:
            raise UsageError(f"{self.option} {self.name}: its context of {context} tokens is too short for the format "
                             f"{self.format_name}; take another judge or another --guard_format")  # fmt: skip
        answer_ids = answer_ids[:room]
        prompt_ids = prompt_ids[len(prompt_ids) - min(len(prompt_ids), room - len(answer_ids)) :]
        return self._ids(tokenizer.decode(prompt_ids), tokenizer.decode(answer_ids))

    def _ids(self, prompt: str, answer: str) -> list[int]:
        chat, text = self.formatter.chat, self.format.text
        if text is None:
            # such templates end with where the verdict begins, and were not made to be asked for a next turn
            return self.formatter.ids(chat.render([("user", prompt), ("assistant", answer)]))
        text = text.format(prompt=prompt, answer=answer)
        if self.format.in_chat:
            text = chat.render([("user", text)], ask=True) + chat.lead
        return self.formatter.ids(text)

    # ---- replies that cannot be read
    def _why_unreadable(self) -> str:
        return (f"its reply to a harmless example, {self._unread() or 'nothing'}, is none of the format "
                f"{self.format_name}; name its own by --guard_format or NAME:FORMAT ({', '.join(FORMATS)}), or take "
                "another judge")  # fmt: skip

    def _unread(self) -> str:
        return repr(self._unread_replies[0][:60]) if self._unread_replies else ""
