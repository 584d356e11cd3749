"""What a model says of text that it is given: perplexity of a text, and the choice among given answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data_module import Encoder, Sequence
from losses import sequence_sum, token_nll
from packing import AnswerLogits
from utils import UsageError


@torch.no_grad()
def perplexity(model, tokenizer, text: str, window: int = 1024, batch_size: int = 4) -> dict:
    """Perplexity of a whole text, read in windows of `window` tokens; each begins with the last token before it.

    The first token is predicted from the beginning-of-text token (the end-of-text one where a model has
    none), as lm-evaluation-harness does. Returns nll (summed, nats), tokens, words, and the perplexity a
    token and a word (words: what white space parts).
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = [start, *ids]
    device, total = next(model.parameters()).device, 0.0
    windows = [ids[i : i + window + 1] for i in range(0, len(ids) - 1, window)]
    full = [w for w in windows if len(w) == window + 1]
    batches = [full[i : i + batch_size] for i in range(0, len(full), batch_size)]
    batches += [[w] for w in windows if len(w) <= window]
    for batch in batches:
        tokens = torch.tensor(batch, device=device)  # (R, T + 1)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # (R, T, V)
        for row, targets in zip(logits, tokens[:, 1:], strict=True):  # a row at a time: fp32 logits are large
            total += F.cross_entropy(row.float(), targets, reduction="sum").item()
    words = len(text.split())
    tokens = len(ids) - 1
    return {"nll": total, "tokens": tokens, "words": words,
            "token_perplexity": math.exp(total / tokens), "word_perplexity": math.exp(total / words)}  # fmt: skip


def read_choices(path: str, option: str) -> list[dict]:
    """Multiple-choice rows in TruthfulQA's layout: question, mc1_targets and mc2_targets (answer -> 1 or 0)."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{option} {path}: cannot be read ({' '.join(str(error).split())})") from error
    for number, row in enumerate(rows, 1):
        for field in ("question", "mc1_targets", "mc2_targets"):
            if field not in row:
                raise UsageError(f"{option} {path}, row {number}: has no '{field}'")
    return rows


@torch.no_grad()
def choices(forward: AnswerLogits, encoder: Encoder, rows: list[dict], style: str, progress=None) -> dict[str, list]:
    """MC1 and MC2 of every row (Lin et al. 2022): is the likeliest answer the true one; the true answers' share.

    An answer's likelihood is the sum over its tokens, without the end-of-turn token.
    """
    device, pad_id = next(forward.parameters()).device, encoder.tokenizer.pad_token_id
    scores: dict[str, list] = {"mc1": [], "mc2": []}
    for row in progress(rows) if progress else rows:
        prompt = tuple(encoder.prompt(row["question"], style))
        answers = {text: tuple(encoder.answer(text, style, complete=False))
                   for field in ("mc1_targets", "mc2_targets") for text in _labels(row[field])}  # fmt: skip
        sequences = [Sequence("normal", i, prompt, ids) for i, ids in enumerate(answers.values())]
        batch = forward.layout(sequences, 1024, pad_id).to(device)
        nll = token_nll(forward(batch), batch.logit_row, batch.targets)  # (M,)
        loglik = dict(zip(answers, (-sequence_sum(nll, batch.sequence, len(sequences))).tolist(), strict=True))
        first, second = _labels(row["mc1_targets"]), _labels(row["mc2_targets"])
        scores["mc1"].append(float(first[max(first, key=loglik.__getitem__)] == 1))
        chance = np.exp(np.array([loglik[text] for text in second]) - max(loglik.values()))
        true = np.array(list(second.values()), dtype=bool)
        scores["mc2"].append(float(chance[true].sum() / chance.sum()))
    return scores


def _labels(targets: dict) -> dict[str, int]:
    """{answer: label} from either layout: that, or {"choices": [...], "labels": [...]}."""
    if targets.keys() == {"choices", "labels"}:
        return dict(zip(targets["choices"], targets["labels"], strict=True))
    return targets
