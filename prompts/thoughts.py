"""Thoughts: how a model marks the text that it writes before its answer, and how an answer is read without it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Markers:
    """The texts that begin and end a thought. With `begins_answer`, the model writes that text before its answer."""

    begin: str
    end: str
    begins_answer: str = ""

    def open_at_end(self, text: str) -> bool:
        """Return whether a text, such as a generation prompt, ends inside a thought that holds nothing yet."""
        return text.rstrip().endswith(self.begin)

    def closing(self, text: str, before_answer: str) -> str:
        """Return what closes the empty thought at the end of `text`.

        before_answer: what the template writes up to an answer. If it ends a thought there (DeepSeek V3.1), its own way
        is taken, else that of Qwen's templates.
        """
        _, ended, after = before_answer[len(text.rstrip()) - len(self.begin) :].partition(self.end)
        if ended:
            return ("\n" if text.endswith("\n") else "") + self.end + after
        return f"\n{self.end}\n\n" if text.endswith("\n") else f"\n\n{self.end}\n\n"


MARKERS = (
    Markers("<think>", "</think>"),  # Qwen 3, DeepSeek R1, GLM, SmolLM3 and most others
    Markers("[THINK]", "[/THINK]"),  # Magistral
    Markers("<seed:think>", "</seed:think>"),
    Markers("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    Markers("<|channel>thought", "<channel|>"),  # Gemma 4
    Markers("<|channel|>analysis<|message|>", "<|end|>", begins_answer="<|channel|>final<|message|>"),  # gpt-oss
)


def markers_of(template: str, tokenizer) -> Markers | None:
    """Return the markers that a chat template or the tokenizer's added tokens hold; None for a model without thoughts.

    A model without them keeps every text as it wrote it, "<think>" in an answer included.
    """
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    for markers in MARKERS:
        # a channel's name is no part of the marker in a template, which puts it in from a variable
        words = markers.begin.replace("analysis", " ").split() if markers.begins_answer else [markers.begin]
        if all(word in template or word in added for word in words):
            return markers
    return None


def without_thoughts(text: str, markers: Markers, *, is_open: bool = False) -> str | None:
    """Return the answer in what a model wrote, or None if that is only an unfinished thought.

    is_open: the prompt ended inside a thought. Only thoughts before the answer are taken away.
    """
    if markers.begins_answer:
        _, found, answer = text.rpartition(markers.begins_answer)
        if found:
            return answer
        return None if text.lstrip().startswith("<|channel|>") else text
    rest = text.lstrip()
    while is_open or rest.startswith(markers.begin):
        _, found, after = rest.partition(markers.end)
        if not found:
            return None
        rest, is_open = after.lstrip(), False
    return rest
