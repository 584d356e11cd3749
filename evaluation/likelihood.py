"""What a model says of text that it is given: perplexity of a text, and the choice among given answers."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_module import PromptFormatter, Sequence
from engine.tree import AnswerLogitsModel
from method.losses import sequence_sum, token_nll
from utils import UsageError, context_length


@torch.no_grad()
def perplexity(model, tokenizer, text: str, window: int = 1024, batch_size: int = 4) -> dict:
    """Perplexity of a whole text, read in windows of `window` tokens (or the model's context); each begins with the
    last token before it, and the last one reaches back so far that it is as long as the others.

    The first token is predicted from the beginning-of-text token (the end-of-text one where a model has
    none), as lm-evaluation-harness does. Returns, by window, nll (summed, nats) and tokens (those scored); words
    (what white space parts) and the perplexity a word, None where no number holds it.
    """
    window = min(window, context_length(model.config) or window)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [start, *ids]
    device, nll, counts = next(model.parameters()).device, [], []
    full = [ids[i : i + window + 1] for i in range(0, len(ids) - window, window)]
    batches = [(full[i : i + batch_size], window) for i in range(0, len(full), batch_size)]
    if rest := len(ids) - 1 - len(full) * window:  # tokens of the last window that no other has scored
        batches.append(([ids[-window - 1 :]], rest))
    for batch, scored in batches:
        tokens = torch.tensor(batch, device=device)  # (R, T + 1)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (R, T, V)
        for row, targets in zip(logits, tokens[:, 1:], strict=True):  # a row at a time: fp32 logits are large
            nll.append(F.cross_entropy(row[-scored:].float(), targets[-scored:], reduction="sum").item())
            counts.append(scored)
    words = len(text.split())
    a_word = sum(nll) / words  # a text without spaces is one word, and e to the power of its NLL past any number
    return {"nll": nll, "tokens": counts, "words": words,
            "word_perplexity": math.exp(a_word) if a_word < 700 else None}  # fmt: skip


def read_text(path: str, option: str) -> str:
    """A text whose perplexity can be taken. Raises UsageError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not text.strip():
        raise UsageError(f"{option} {path}: holds no text")
    return text


@dataclasses.dataclass
class TokenScores:
    """What a model says of one answer it is given, token by token; every list has an entry a token."""

    targets: list[int]
    log_probs: list[float]  # of the answer's tokens, nats
    predicted: list[int]  # the likeliest token at each place
    means: list[float]  # mean and standard deviation of log p over the vocabulary, weighted with p
    deviations: list[float]

    @property
    def nll(self) -> float:
        """Mean token NLL, nats."""
        return -sum(self.log_probs) / len(self.log_probs)


@torch.no_grad()
def score_answers(forward: AnswerLogitsModel, sequences: list[Sequence], pad_id: int) -> list[TokenScores | None]:
    """One `TokenScores` for each sequence's answer, in order; None for an answer without tokens."""
    device, found = next(forward.parameters()).device, [None] * len(sequences)
    order = sorted((i for i, s in enumerate(sequences) if s.answer_ids),
                   key=lambda i: len(sequences[i].prompt_ids) + len(sequences[i].answer_ids))  # fmt: skip
    for start in range(0, len(order), 16):
        chunk = order[start : start + 16]
        batch = forward.layout([sequences[i] for i in chunk], 256, pad_id).to(device)
        logits = forward(batch)  # (N, V)
        for n, i in enumerate(chunk):
            mine = batch.sequence_ids == n
            log_p = F.log_softmax(logits[batch.target_to_logit[mine]].float(), dim=-1)  # (T, V)
            p = log_p.exp()
            means = (p * log_p).sum(-1)  # (T,)
            spread = ((p * log_p.square()).sum(-1) - means.square()).clamp(min=0).sqrt()
            targets = batch.targets[mine]
            found[i] = TokenScores(targets.tolist(), log_p.gather(1, targets[:, None])[:, 0].tolist(),
                              log_p.argmax(-1).tolist(), means.tolist(), spread.tolist())  # fmt: skip
    return found


def read_choices(path: str, option: str) -> list[dict]:
    """Multiple-choice rows in TruthfulQA's layout: question, mc1_targets and mc2_targets (answer -> 1 or 0)."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{option} {path}: must be a list of objects, as TruthfulQA's mc_task.json is")
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("question"), str):
            raise UsageError(f"{option} {path}, row {number}: has no 'question'")
        for field in ("mc1_targets", "mc2_targets"):
            try:
                right = list(labels_of(row[field]).values())
            except (KeyError, AttributeError, TypeError, ValueError):
                right = []
            if not any(right):
                raise UsageError(f"{option} {path}, row {number}: '{field}' must hold answers and their labels, at "
                                 "least one of them 1")  # fmt: skip
    return rows


@torch.no_grad()
def choices(
    forward: AnswerLogitsModel, formatter: PromptFormatter, rows: list[dict], style: str, progress=None
) -> dict[str, list]:
    """MC1 and MC2 of every row (Lin et al. 2022): is the likeliest answer the true one; the true answers' share.

    An answer's likelihood is the sum over its tokens, all that the context holds, without the end-of-turn token.
    """
    context = context_length(forward.model.config) or 4096
    device, pad_id = next(forward.parameters()).device, formatter.tokenizer.pad_token_id
    scores: dict[str, list] = {"mc1": [], "mc2": []}
    for row in progress(rows) if progress else rows:
        prompt = tuple(formatter.prompt(row["question"], style))
        answers = {text: tuple(formatter.answer(text, style, complete=False, limit=context - len(prompt)))
                   for field in ("mc1_targets", "mc2_targets") for text in labels_of(row[field])}  # fmt: skip
        sequences = [Sequence("normal", i, prompt, ids) for i, ids in enumerate(answers.values())]
        batch = forward.layout(sequences, 1024, pad_id).to(device)
        nll = token_nll(forward(batch), batch.target_to_logit, batch.targets)  # (M,)
        loglik = dict(zip(answers, (-sequence_sum(nll, batch.sequence_ids, len(sequences))).tolist(), strict=True))
        first, second = labels_of(row["mc1_targets"]), labels_of(row["mc2_targets"])
        scores["mc1"].append(float(first[max(first, key=loglik.__getitem__)] == 1))
        chance = np.exp(np.array([loglik[text] for text in second]) - max(loglik.values()))
        true = np.array(list(second.values()), dtype=bool)
        scores["mc2"].append(float(chance[true].sum() / chance.sum()))
    return scores


def labels_of(targets: dict) -> dict[str, int]:
    """{answer: label} from either layout: that, or {"choices": [...], "labels": [...]}."""
    if targets.keys() == {"choices", "labels"}:
        return dict(zip(targets["choices"], targets["labels"], strict=True))
    return targets
