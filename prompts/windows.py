"""Passages of text: documents cut into windows of tokens, which are trained on exactly as they stand there."""

from __future__ import annotations

import dataclasses

from sources.rows import Row
from utils import UsageError, context_length, log


@dataclasses.dataclass(frozen=True, slots=True)
class Passage(Row):
    """A window of a document's tokens. Its response is its text, for measures that read text.

    The tokens are the document's own: the passage's text alone may have others at its edges. `start`: the place of
    the first one in its document. `shown`: how many of them belong to the prompt, and `middle`: where the second half
    begins in `text`; both serve `ask_to_go_on`.
    """

    token_ids: tuple[int, ...] = ()
    start: int = 0
    shown: int = 0
    text: str = ""
    middle: int = 0

    @property
    def key(self) -> str:
        """The text that tells this passage from others, whichever part of it is the prompt."""
        return self.text

    def prompt_and_answer(self, has_start: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return (the tokens of the prompt, those of the answer). Without a start token, the first is the prompt."""
        prompt = self.shown or (0 if has_start else 1)
        return self.token_ids[:prompt], self.token_ids[prompt:]

    @property
    def end(self) -> int:
        """The place after the last token in its document."""
        return self.start + len(self.token_ids)


def ask_to_go_on(row: Row) -> Row:
    """Return a passage with its first half as the prompt and the rest as the response; other rows as they are."""
    if not isinstance(row, Passage):
        return row
    return dataclasses.replace(
        row, shown=_half(len(row.token_ids)), prompt=row.text[: row.middle].strip(),
        response=row.text[row.middle :].strip(),
    )  # fmt: skip


def whole(row: Row) -> Row:
    """Return a passage as it is trained on, with all of its text as the response; other rows as they are."""
    return dataclasses.replace(row, shown=0, prompt="", response=row.text) if isinstance(row, Passage) else row


def window_spans(length: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return (start, end) of the windows over `length` tokens. The last one reaches back until it is a whole window.

    With a stride of at most `window`, every token is in a window. Fewer tokens than `window` are one window.
    """
    if length <= window:
        return [(0, length)] if length else []
    spans = [(start, start + window) for start in range(0, length - window, stride)]
    return [*spans, (length - window, length)]


class TextCutter:
    """Cuts documents into passages of `window` tokens, one every `stride` tokens (0: as `window`).

    has_start: whether a start token stands before every passage. Without one, a passage's first token is its prompt.
    Passages then begin at the last token of the one before, so that only a document's first token, which nothing
    predicts, is never an answer token. Raises UsageError if no token would be left to train on.
    """

    def __init__(self, tokenizer, window: int, stride: int = 0, *, has_start: bool):
        if window < 2 and not has_start:
            raise UsageError("--text_window 1: this model has no token that begins a text, so a passage needs a first "
                             "token that is not trained on; give at least 2")  # fmt: skip
        self.tokenizer, self.window, self.has_start = tokenizer, window, has_start
        self.stride = stride or window
        if not has_start and self.stride == window:
            self.stride = window - 1
        self._last: tuple[Row, _Tokens] | None = None

    @classmethod
    def of(cls, formatter, options) -> TextCutter:
        """Return the cutter of a run or an evaluation; both cut alike, since their options agree."""
        if options.text_stride > options.text_window:
            log.warning("--text_stride %d is longer than --text_window %d: of every %d tokens of a text, %d are in no "
                        "passage", options.text_stride, options.text_window, options.text_stride,
                        options.text_stride - options.text_window)  # fmt: skip
        return cls(formatter.tokenizer, options.text_window, options.text_stride, has_start=bool(formatter.text_start))

    def cut(self, document: Row, start: int = 0, end: int | None = None) -> list[Passage]:
        """Return the passages of a document, or of its tokens from `start` to `end`; none if it has too few tokens."""
        end = self.num_tokens(document) if end is None else end
        if end - start < 2 - self.has_start:
            return []
        spans = window_spans(end - start, self.window, self.stride)
        return [self._passage(document, start + first, start + last) for first, last in spans]

    def blocks(self, document: Row) -> list[Passage]:
        """Return consecutive passages of `window` tokens that do not overlap. Less than half a window at the end goes
        to the last one."""
        length = self.num_tokens(document)
        starts = range(0, max(length - _half(self.window), 0) + 1, self.window)
        return [self._passage(document, a, b) for a, b in zip(starts, [*starts[1:], length], strict=True)]

    def num_tokens(self, document: Row) -> int:
        """Return the number of a document's tokens."""
        return len(self._tokens(document).ids)

    def _tokens(self, document: Row) -> _Tokens:
        """Return a document's tokens. Its blocks and its passages are asked for one after the other, so the last
        document is remembered."""
        if self._last is None or self._last[0] is not document:
            self._last = document, _Tokens.of(document.response or "", self.tokenizer)
        return self._last[1]

    def _passage(self, document: Row, start: int, end: int) -> Passage:
        """Return the tokens [start, end) of a document as a passage."""
        tokens = self._tokens(document)
        text, first_half = tokens.text(start, end), tokens.text(start, start + _half(end - start))
        shared = {field.name: getattr(document, field.name) for field in dataclasses.fields(Row)}
        return Passage(**shared | {"response": text}, token_ids=tuple(tokens.ids[start:end]), start=start, text=text,
                       middle=min(len(first_half), len(text)))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """A document's token ids (n), and `places` (n + 1): where each token begins in the text, and the text's end.

    Tokenizers written in Python tell no places: the text of a passage is then its tokens decoded.
    """

    whole_text: str
    tokenizer: object
    ids: list[int]
    places: list[int] | None

    @classmethod
    def of(cls, text: str, tokenizer) -> _Tokens:
        if not tokenizer.is_fast:
            return cls(text, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], None)
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return cls(text, tokenizer, found["input_ids"], [*(begin for begin, _ in found["offset_mapping"]), len(text)])

    def text(self, start: int, end: int) -> str:
        """Return the text of the tokens [start, end)."""
        if self.places is None:
            return self.tokenizer.decode(self.ids[start:end])
        return self.whole_text[self.places[start] : self.places[end]]


def _half(count: int) -> int:
    """Return how many of a passage's tokens are its first half."""
    return -(-count // 2)


def fit_windows(formatter, config, window: int) -> None:
    """Tell the formatter how long a passage may be. Raises UsageError if it does not fit into the model's context."""
    context, begin = context_length(config), len(formatter.text_start)
    if context and context < window + begin:
        raise UsageError(f"--text_window {window}: the model reads at most {context} tokens; give at most "
                         f"{context - begin}")  # fmt: skip
    formatter.longest_answer = max(formatter.longest_answer, window)
