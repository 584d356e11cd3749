"""Score given text with a model: the perplexity of a text, the tokens of an answer, the choice among answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_module import Sequence
from engine.tree import AnswerLogitsModel
from method.losses import sequence_sum, token_nll
from prompts.formatter import PromptFormatter
from sources.containers import RECORD_KINDS, read_document
from sources.fields import CHOICE_FIELDS
from sources.folders import open_spec
from sources.values import choices_of
from utils import UsageError, context_length


@torch.no_grad()
def perplexity(model, tokenizer, text: str, window: int = 1024, batch_size: int = 4) -> dict:
    """Return the perplexity of a whole text, read in windows of `window` tokens (at most the model's context).

    The dict holds, by window, nll (summed, nats) and tokens (number scored), and for the text words (split at white
    space) and word_perplexity, None if it exceeds any float. A window begins with the last token before it. The last
    window reaches back until it is as long as the others. The first token is predicted from the beginning-of-text token
    (end-of-text if a model has none), as lm-evaluation-harness does.
    """
    window = min(window, context_length(model.config) or window)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [start, *ids]
    device, nll, counts = next(model.parameters()).device, [], []
    full = [ids[i : i + window + 1] for i in range(0, len(ids) - window, window)]
    batches = [(full[i : i + batch_size], window) for i in range(0, len(full), batch_size)]
    if rest := len(ids) - 1 - len(full) * window:  # tokens that only the last window scores
        batches.append(([ids[-window - 1 :]], rest))
    for batch, scored in batches:
        tokens = torch.tensor(batch, device=device)  # (R, T + 1)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (R, T, V)
        for row, targets in zip(logits, tokens[:, 1:], strict=True):  # a row at a time: fp32 logits are large
            nll.append(F.cross_entropy(row[-scored:].float(), targets[-scored:], reduction="sum").item())
            counts.append(scored)
    words = len(text.split())
    word_nll = sum(nll) / words  # a text without spaces is one word; exp of its NLL overflows
    return {"nll": nll, "tokens": counts, "words": words,
            "word_perplexity": math.exp(word_nll) if word_nll < 700 else None}  # fmt: skip


def read_text(path: str, option: str) -> str:
    """Return the text of a file. Raises UsageError, naming `option`, if it cannot be read or holds no text."""
    text = read_document(Path(path), option)
    if not text.strip():
        raise UsageError(f"{option} {path}: holds no text")
    return text


@dataclasses.dataclass
class TokenScores:
    """A model's scores of one given answer; every list has one entry per token."""

    targets: list[int]  # the answer's tokens
    log_probs: list[float]  # of the answer's tokens, nats
    predicted: list[int]  # the likeliest token at each position
    means: list[float]  # mean and standard deviation of log p over the vocabulary, weighted with p
    deviations: list[float]

    @property
    def nll(self) -> float:
        """The mean token NLL, nats."""
        return -sum(self.log_probs) / len(self.log_probs)

    def first(self, count: int) -> TokenScores:
        """Return the scores of the first `count` tokens."""
        return TokenScores(*(getattr(self, field.name)[:count] for field in dataclasses.fields(self)))


@torch.no_grad()
def score_answers(answer_model: AnswerLogitsModel, sequences: list[Sequence], pad_id: int) -> list[TokenScores | None]:
    """Return the scores of each sequence's answer, in order; None for an answer without tokens."""
    device, scores = next(answer_model.parameters()).device, [None] * len(sequences)
    for chunk in chunks_of(sequences):
        batch = answer_model.layout([sequences[i] for i in chunk], 256, pad_id).to(device)
        logits = answer_model(batch)  # (N, V)
        for n, i in enumerate(chunk):
            is_own = batch.sequence_ids == n  # (M,) bool
            log_p = F.log_softmax(logits[batch.target_to_logit[is_own]].float(), dim=-1)  # (T, V)
            p = log_p.exp()
            means = (p * log_p).sum(-1)  # (T,)
            deviations = ((p * log_p.square()).sum(-1) - means.square()).clamp(min=0).sqrt()  # (T,)
            targets = batch.targets[is_own]  # (T,)
            scores[i] = TokenScores(targets.tolist(), log_p.gather(1, targets[:, None])[:, 0].tolist(),
                                    log_p.argmax(-1).tolist(), means.tolist(), deviations.tolist())  # fmt: skip
    return scores


@torch.no_grad()
def nll_of_answers(answer_model: AnswerLogitsModel, sequences: list[Sequence], pad_id: int) -> list[float | None]:
    """Return the summed token NLL (nats) of each sequence's answer, in order; None for an answer without tokens."""
    device, sums = next(answer_model.parameters()).device, [None] * len(sequences)
    for chunk in chunks_of(sequences):
        batch = answer_model.layout([sequences[i] for i in chunk], 256, pad_id).to(device)
        nll = token_nll(answer_model(batch), batch.target_to_logit, batch.targets)  # (M,)
        for i, value in zip(chunk, sequence_sum(nll, batch.sequence_ids, len(chunk)).tolist(), strict=True):
            sums[i] = value
    return sums


def chunks_of(sequences: list[Sequence], size: int = 16) -> Iterator[list[int]]:
    """Yield the indices of the sequences that have an answer, `size` at a time: those of like length together, and
    answers to one prompt side by side, where they share its tokens."""
    longest: dict[tuple[int, ...], int] = {}
    for s in sequences:
        longest[s.prompt_ids] = max(longest.get(s.prompt_ids, 0), len(s.answer_ids))
    order = sorted((i for i, s in enumerate(sequences) if s.answer_ids), key=lambda i: (
        len(sequences[i].prompt_ids) + longest[sequences[i].prompt_ids], sequences[i].prompt_ids))  # fmt: skip
    for start in range(0, len(order), size):
        yield order[start : start + size]


def read_choices(path: str, option: str) -> list[dict]:
    """Return multiple-choice rows in TruthfulQA's layout: question, mc1_targets and mc2_targets (answer -> 1 or 0).

    A row with question, choices and answer (MMLU, WMDP) becomes one with these. Raises UsageError, naming `option` and
    the row.
    """
    rows = []
    for record in open_spec(path, option, RECORD_KINDS).records:
        row = record.fields
        if not isinstance(row.get("question"), str):
            raise UsageError(f"{record}: has no 'question'")
        if "mc1_targets" not in row and any(field in row for field in CHOICE_FIELDS):
            choices, right = choices_of(record)
            targets = {choice: 0 for choice in choices} | {choices[right]: 1}
            row = {"question": row["question"], "mc1_targets": targets, "mc2_targets": targets}
        for field in ("mc1_targets", "mc2_targets"):
            try:
                right = list(labels_of(row[field]).values())
            except (KeyError, AttributeError, TypeError, ValueError):
                right = []
            if not any(right):
                raise UsageError(f"{record}: '{field}' must hold answers and their labels, at least one of them 1")
        rows.append(row)
    if not rows:
        raise UsageError(f"{option} {path}: holds no question")
    return rows


@torch.no_grad()
def choices(
    answer_model: AnswerLogitsModel, formatter: PromptFormatter, rows: list[dict], style: str, progress=None
) -> dict[str, list]:
    """Return MC1 and MC2 of every row (Lin et al. 2022): 1 if the likeliest answer is the true one, else 0; the true
    answers' share of the likelihood.

    An answer's log-likelihood is the sum over its tokens, as many as the context holds, without the end of turn.
    """
    context = context_length(answer_model.model.config) or 4096
    device, pad_id = next(answer_model.parameters()).device, formatter.tokenizer.pad_token_id
    scores: dict[str, list] = {"mc1": [], "mc2": []}
    for row in progress(rows) if progress else rows:
        prompt = tuple(formatter.prompt(row["question"], style))
        answers = {text: tuple(formatter.answer(text, style, complete=False, limit=context - len(prompt)))
                   for field in ("mc1_targets", "mc2_targets") for text in labels_of(row[field])}  # fmt: skip
        sequences = [Sequence("normal", i, prompt, ids) for i, ids in enumerate(answers.values())]
        batch = answer_model.layout(sequences, 1024, pad_id).to(device)
        nll = token_nll(answer_model(batch), batch.target_to_logit, batch.targets)  # (M,)
        loglik = dict(zip(answers, (-sequence_sum(nll, batch.sequence_ids, len(sequences))).tolist(), strict=True))
        first, second = labels_of(row["mc1_targets"]), labels_of(row["mc2_targets"])
        scores["mc1"].append(float(first[max(first, key=loglik.__getitem__)] == 1))
        likelihood = np.exp(np.array([loglik[text] for text in second]) - max(loglik.values()))  # (answers,)
        is_true = np.array(list(second.values()), dtype=bool)
        scores["mc2"].append(float(likelihood[is_true].sum() / likelihood.sum()))
    return scores


def labels_of(targets: dict) -> dict[str, int]:
    """Return {answer: label} from either layout: that one, or {"choices": [...], "labels": [...]}."""
    if targets.keys() == {"choices", "labels"}:
        return dict(zip(targets["choices"], targets["labels"], strict=True))
    return targets
