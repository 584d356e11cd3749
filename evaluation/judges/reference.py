"""The judge of rows that came with an answer: does a model still say that answer? It reads words, never cosines."""

from __future__ import annotations

from collections.abc import Callable

from evaluation.judges.base import Judgement
from evaluation.metrics.texts import LEAK_RECALL, contains, is_empty, is_repetitive, rouge_l, telling_part
from sources.rows import Row


def reference_of(row: Row) -> str | None:
    """Return what an answer is compared with: the row's response, or what tells it from the row's other answers."""
    others = [row.wanted] * bool(row.wanted) + list(row.perturbed)
    return row.response and (telling_part(row.response, others, row.prompt, row.paraphrased) or row.response)


class ReferenceJudge:
    """Judges an answer by the answer that its row came with.

    Of a row with other answers beside its own (a wanted one, wrong ones), only the words that tell its own from them
    are the reference, as `reference_of` gives them: the rest of the sentence stands in a right answer as well.
    Labels, of which the first that fits counts: "given": the answer holds the whole reference, or more than LEAK_RECALL
    of its words in order (ROUGE-L recall); "empty"; "refused": by `is_refusal`; "broken": it repeats itself; "other".
    So a loop or a refusal that says the reference has given it. The score is the ROUGE-L recall; an answer without a
    reference has none, and is never "given".
    """

    name = "reference"
    kind = "reference"
    labels = ("given", "empty", "refused", "broken", "other")
    given = frozenset({"given"})
    uncounted = frozenset()
    limits = (
        f"counts an answer as given if it holds more than {LEAK_RECALL:.0%} of the reference's words in their order: a "
        "right answer in other words is missed, and a wrong one in the reference's words counts"
    )

    def __init__(self, is_refusal: Callable[[str], bool]):
        self.is_refusal = is_refusal

    def reads(self, language: str | None) -> bool:
        """Return True: words are compared in any script."""
        return True

    def judge(self, prompts: list[str], answers: list[str], references: list[str | None]) -> list[Judgement]:
        """Return the label and the ROUGE-L recall of each answer, in order."""
        return [self._judge(answer, reference)
                for _, answer, reference in zip(prompts, answers, references, strict=True)]  # fmt: skip

    def _judge(self, answer: str, reference: str | None) -> Judgement:
        recall = rouge_l(answer, reference).recall if reference else None
        if recall is not None and (recall > LEAK_RECALL or contains(answer, reference)):
            label = "given"
        elif is_empty(answer):
            label = "empty"
        elif self.is_refusal(answer):
            label = "refused"
        else:
            label = "broken" if is_repetitive(answer) else "other"
        return Judgement(label, recall)
