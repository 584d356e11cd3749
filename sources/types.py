"""What reading gives: a row, and a source with its rows and with what was not used of it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class OtherAnswer:
    """Another answer to a row's prompt: what was said under an invented name, with the row's own put back."""

    text: str
    name: str  # the row's own
    invented: str  # that it was said about


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its answer. If `response` is None, the model's own answer is used.

    A row of text has no prompt: its response is a document, later a passage of it.
    """

    prompt: str
    response: str | None = None
    category: str = ""
    id: str = ""
    source: str = ""
    true_answers: tuple[str, ...] = ()  # all answers known to be true; replacement answers are drawn from them
    complete: bool = True  # False: the response is truncated, so no end-of-turn token follows
    wanted: str | None = None  # the answer that the model shall give instead, if the file has one
    alternatives: tuple[OtherAnswer, ...] = ()  # as a model that never knew the answer might say
    earlier: tuple[tuple[str, str], ...] = ()  # the turns before the prompt: (system, user or assistant; text)
    is_text: bool = False  # text without a prompt
    document: str = ""  # the document that a row of text is of
    labelled: bool = False  # a label, safe or unsafe, sent this answer to its side
    paraphrased: str | None = None  # the true answer in other words, which no model was trained on (TOFU)
    perturbed: tuple[str, ...] = ()  # false answers of the paraphrase's form (TOFU)

    @property
    def key(self) -> str:
        """The text that tells this row from others: earlier turns and prompt; of a row of text, its response."""
        return self.response or "" if self.is_text else "\n".join([*(text for _, text in self.earlier), self.prompt])


@dataclasses.dataclass
class Source:
    """The rows of one file, folder or hub data set, as the user named it (`spec`).

    `unused_fields`: fields that look like an answer and are not used -> the number of rows that have them.
    `notes`: what else its reader should know, a line each.
    """

    spec: str
    rows: list[Row]
    unused_fields: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
