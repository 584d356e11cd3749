"""How a run looks at itself on the way: a few development prompts of both sides, and which state is best."""

from __future__ import annotations

import dataclasses

import torch

from data_module import PromptFormatter, make_sequence
from engine.generation import generate
from engine.reference import ReferenceCache
from engine.token_values import fused_nll_and_kl
from engine.tree import AnswerLogitsModel
from evaluation.judges import SentenceEmbedder
from evaluation.metrics import is_empty, on_topic
from sources.rows import Row


@dataclasses.dataclass
class DevEvaluator:
    """The development rows of a run, tokenised once. Each has a response by the time this is made."""

    forget: list[Row]
    normal: list[Row]
    formatter: PromptFormatter
    options: object

    def __post_init__(self):
        self.sequences = [make_sequence("forget", 0, row, self.formatter) for row in self.forget]
        self.sequences += [make_sequence("normal", 0, row, self.formatter) for row in self.normal]
        prompts = [row.prompt for row in self.forget + self.normal]
        self.embed = SentenceEmbedder() if SentenceEmbedder.available() and prompts else None
        self.prompt_vectors = self.embed(prompts) if self.embed else None

    @torch.no_grad()
    def look(self, forward: AnswerLogitsModel, reference: ReferenceCache) -> dict:
        """Figures of the model as it is now; `docs/fields.md` says what each means. None: nothing to measure."""
        totals = {"nll": [], "kl": [], "first_kl": []}
        device = next(forward.parameters()).device
        for start in range(0, len(self.sequences), 16):
            part = self.sequences[start : start + 16]
            batch = forward.layout(part, self.options.pack_tokens, self.formatter.tokenizer.pad_token_id).to(device)
            logits = forward(batch)  # (N, V)
            forget, normal = batch.tokens_of("forget"), batch.tokens_of("normal")
            original = reference.logits([s for s in part if s.kind == "normal"])
            nll, kl = fused_nll_and_kl(
                logits, batch.target_to_logit, batch.targets, batch.target_to_logit[normal], original
            )
            totals["nll"].append(nll[forget])
            totals["kl"].append(kl)
            totals["first_kl"].append(kl[batch.is_first_token[normal]])
        found = {f"dev_{name}": torch.cat(v).mean().item() if v and torch.cat(v).numel() else None
                 for name, v in totals.items()}  # fmt: skip
        return {**found, **self._answers(forward.generator)}

    def _answers(self, model) -> dict:
        rows = self.forget + self.normal
        prompts = [self.formatter.prompt(row.prompt) for row in rows]
        answers = generate(
            model, self.formatter, prompts, max_new_tokens=self.options.eval_tokens,
            batch_size=self.options.generation_batch,
        )  # fmt: skip
        texts = [text for text, _ in answers]
        found = {}
        sides = {"forget": slice(0, len(self.forget)), "normal": slice(len(self.forget), None)}
        if self.embed:
            cosine = (self.embed(texts) * self.prompt_vectors).sum(-1).tolist()
            topical = [on_topic(c, text) for c, text in zip(cosine, texts, strict=True)]
            found = {f"dev_{side}_on_topic": _share(topical[part]) for side, part in sides.items()}
        return found | {f"dev_{side}_empty": _share([is_empty(t) for t in texts[part]]) for side, part in sides.items()}

    def selection_key(self, found: dict) -> tuple[float, float]:
        """Smaller is better, for states within the KL budget: answers lost or still given, then the KL."""
        if self.embed and found["dev_forget_on_topic"] is not None and found["dev_normal_on_topic"] is not None:
            return found["dev_forget_on_topic"] - found["dev_normal_on_topic"], found["dev_kl"] or 0.0
        return -(found["dev_nll"] or 0.0), found["dev_kl"] or 0.0


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
