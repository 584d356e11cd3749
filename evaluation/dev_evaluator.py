"""How a run evaluates itself on the way: a few development prompts of both sides, and which state is best."""

from __future__ import annotations

import torch

from data_module import make_sequence
from engine.generation import generate
from engine.reference import ReferenceCache
from engine.token_values import fused_nll_and_kl
from engine.tree import AnswerLogitsModel
from evaluation.judges.embedder import Embedder, SentenceEmbedder
from evaluation.judges.outcome import OutcomeJudge
from evaluation.metrics.texts import is_empty
from prompts.formatter import PromptFormatter
from sources.rows import Row

BATCH = 16  # sequences


class DevEvaluator:
    """The development rows of a run, put into tokens once. Each has a response by the time this is made.

    Passages of text are measured by NLL and KL alone: a text goes on about its subject even if none of it is known.
    """

    def __init__(
        self, forget: list[Row], normal: list[Row], formatter: PromptFormatter, *, answer_tokens: int,
        pack_tokens: int, batch_size: int,
    ):  # fmt: skip
        self.rows = {"forget": forget, "normal": normal}
        self.formatter, self.answer_tokens = formatter, answer_tokens
        self.pack_tokens, self.batch_size = pack_tokens, batch_size
        self.sequences = [make_sequence(side, 0, row, formatter) for side, rows in self.rows.items() for row in rows]
        self.asked = {side: [row for row in rows if not row.is_text] for side, rows in self.rows.items()}
        is_judged = SentenceEmbedder.available() and any(self.asked.values())
        self.judge = OutcomeJudge(Embedder(SentenceEmbedder())) if is_judged else None

    @torch.no_grad()
    def evaluate(self, answer_model: AnswerLogitsModel, reference: ReferenceCache) -> dict[str, float | None]:
        """Metrics of the model as it is now; `docs/fields.md` says what each means. None: nothing to measure."""
        values: dict[str, list[torch.Tensor]] = {"nll": [], "kl": [], "first_token_kl": []}
        device = next(answer_model.parameters()).device
        for start in range(0, len(self.sequences), BATCH):
            part = self.sequences[start : start + BATCH]
            batch = answer_model.layout(part, self.pack_tokens, self.formatter.tokenizer.pad_token_id).to(device)
            forget, normal = batch.tokens_of("forget"), batch.tokens_of("normal")  # (M,) bool
            original = reference.logits([s for s in part if s.draw == "normal"])
            nll, kl = fused_nll_and_kl(
                answer_model(batch), batch.target_to_logit, batch.targets, batch.target_to_logit[normal], original
            )
            values["nll"].append(nll[forget])
            values["kl"].append(kl)
            values["first_token_kl"].append(kl[batch.is_first_token[normal]])
        metrics = {f"dev_{name}": torch.cat(v).mean().item() if v and torch.cat(v).numel() else None
                   for name, v in values.items()}  # fmt: skip
        return metrics | self._answer_rates(answer_model.generator)

    def _answer_rates(self, model) -> dict[str, float | None]:
        """How many prompts are answered, by the judge of outcomes, and how many answers are empty, a side."""
        rows = [row for some in self.asked.values() for row in some]
        prompts = [self.formatter.prompt_of(row) for row in rows]
        answers = generate(
            model, self.formatter, prompts, max_new_tokens=self.answer_tokens, batch_size=self.batch_size
        )
        texts, rates, start, answered = [text for text, _ in answers], {}, 0, None
        if self.judge:
            judged = self.judge.judge([row.prompt for row in rows], texts, [None] * len(rows))
            answered = [judgement.label in self.judge.given for judgement in judged]
        for side, some in self.asked.items():
            part = slice(start, start + len(some))
            if answered is not None:
                rates[f"dev_{side}_answered"] = _rate(answered[part])
            rates[f"dev_{side}_empty"] = _rate([is_empty(text) for text in texts[part]])
            start += len(some)
        return rates

    def selection_key(self, metrics: dict) -> tuple[float, float]:
        """Smaller is better, for states within the KL budget: answers lost or still given, then the KL."""
        forget, normal = metrics.get("dev_forget_answered"), metrics.get("dev_normal_answered")
        if forget is not None and normal is not None:
            return forget - normal, metrics["dev_kl"] or 0.0
        return -(metrics["dev_nll"] or 0.0), metrics["dev_kl"] or 0.0


def _rate(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
