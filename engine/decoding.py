"""Decode a batch of prompts over key-value buffers of fixed size, on a GPU by one captured graph a token.

A small model's token costs the host 25 to 90 ms of launches, whatever the batch; a graph's replay costs it one. The
first tokens are decoded as usual, which also warms the kernels up; then one step is captured and replayed.

Letters: R prompts, T places of the padded prompts, L = T + new tokens, V vocabulary.
"""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from engine.speedups import BLOCKS, NAME
from utils import log

TAKES_BOOLS = ("sdpa", NAME, BLOCKS)  # attention by torch's fused kernel
WARM = 2  # tokens decoded without the graph
LOOK = 8  # tokens between two looks whether all answers have ended: each look waits for the device


def takes_buffers(model) -> bool:
    """Say whether a model's forward can run over buffers: it is told each token's place, and which logits to make, and
    its attention takes a mask of true and false (one that adds its mask to the scores does not)."""
    known = inspect.signature(model.forward).parameters
    attention = getattr(model.config, "_attn_implementation", None)
    return ({"position_ids", "logits_to_keep", "past_key_values"} <= set(known) and attention in TAKES_BOOLS
            and not getattr(model.config, "alibi", False))  # fmt: skip


def chosen(scores: torch.Tensor, draws: torch.Tensor | None, temperature: float) -> torch.Tensor:
    """Return the next tokens (R, 1): the likeliest, or with draws (R, 1) in [0, 1) one of the softmax at `temperature`.

    scores (R, V). One number against the cumulated probabilities is enough: torch.multinomial draws one for every
    token of the vocabulary, which took a third of the time of an answer.
    """
    if draws is None:
        return scores.argmax(-1, keepdim=True)
    cumulated = torch.softmax(scores.float() / temperature, dim=-1).cumsum(-1)  # (R, V), ends at about 1
    place = draws.to(cumulated) * cumulated[:, -1:]  # (R, 1), below the end
    return torch.searchsorted(cumulated, place, right=True).clamp(max=scores.shape[-1] - 1)


class Decoder:
    """A batch that is being answered. Every tensor is changed in place, so that a graph can be replayed."""

    def __init__(
        self, model, ids, mask, cache, *, new_tokens: int, stop: list[int], pad: int, draws, temperature: float,
    ):  # fmt: skip
        """Read the prompts and choose the first tokens.

        ids, mask (R, T): padded on the left; cache: the keys and values of their first tokens, or None; draws
        (R, new tokens): uniform numbers, or None for greedy answers. Raises TypeError for a cache of another kind.
        """
        self.model, self.draws, self.temperature, self.pad = model, draws, temperature, pad
        rows, width = ids.shape
        done = cache.get_seq_length() if cache is not None else 0
        places = (mask.cumsum(-1) - 1).clamp(min=0)  # (R, T)
        out = model(
            input_ids=ids[:, done:], attention_mask=mask, position_ids=places[:, done:], use_cache=True,
            past_key_values=DynamicCache(config=model.config) if cache is None else cache, logits_to_keep=1,
        )  # fmt: skip
        length = width + new_tokens
        self.cache = _buffers(model, out.past_key_values, length)
        device = ids.device
        self.stop = torch.tensor(sorted(stop), device=device)
        self.columns = torch.arange(length, device=device)  # (L,)
        self.seen = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)
        self.seen[:, 0, 0, :width] = mask.bool()
        self.column = torch.full((1,), width, device=device)  # of the next token that is read
        self.place = places[:, -1:] + 1  # (R, 1)
        self.number = torch.zeros(1, dtype=torch.long, device=device)  # of the next token that is chosen
        self.said = torch.full((rows, new_tokens), pad, device=device)
        self.ended = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.token = torch.empty(rows, 1, dtype=torch.long, device=device)
        self._choose(out.logits[:, -1])

    def _choose(self, scores: torch.Tensor) -> None:
        """Choose the next tokens from scores (R, V), and note them."""
        draws = None if self.draws is None else self.draws.index_select(1, self.number)  # (R, 1)
        token = chosen(scores, draws, self.temperature).masked_fill(self.ended, self.pad)
        self.token.copy_(token)
        self.said.index_copy_(1, self.number, token)
        self.ended.logical_or_(torch.isin(token, self.stop))
        self.number.add_(1)

    def step(self) -> None:
        """Read the last tokens and choose the next ones."""
        self.seen.logical_or_(self.columns == self.column)
        out = self.model(input_ids=self.token, attention_mask=self.seen, position_ids=self.place,
                         past_key_values=self.cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        self.column.add_(1)
        self.place.add_(1)
        self._choose(out.logits[:, -1])


def decode(decoder: Decoder, *, capture: bool) -> torch.Tensor:
    """Answer to the end; return the tokens (R, new tokens), filled up with padding. capture: replay a graph."""
    step, new_tokens = decoder.step, decoder.said.shape[1]
    for number in range(1, new_tokens):
        if capture and number == WARM + 1:
            step = _captured(decoder)
        step()
        if number % LOOK == 0 and bool(decoder.ended.all()):
            break
    return decoder.said


def _captured(decoder: Decoder):
    """Return what runs a step: a graph's replay, or the step itself where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            decoder.step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a layer that asks the device on the way
        torch.cuda.synchronize()
        log.info("answers: a step of %s cannot be captured (%s); it runs as it is", type(decoder.model).__name__,
                 (str(error).strip().splitlines() or ["no reason given"])[0][:120])  # fmt: skip
        return decoder.step
    return graph.replay


def _buffers(model, cache, length: int) -> StaticCache:
    """Return the keys and values of a cache in buffers of `length` places; the cache is emptied on the way."""
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise TypeError(f"{type(cache).__name__}: not a plain cache of keys and values")
    buffers = StaticCache(config=model.config, max_cache_len=length)
    for layer, filled in zip(buffers.layers, cache.layers, strict=True):
        layer.lazy_initialization(filled.keys, filled.values)
        width = filled.keys.shape[-2]
        layer.keys[:, :, :width], layer.values[:, :, :width] = filled.keys, filled.values
        layer.cumulative_length.fill_(width)
        filled.keys = filled.values = None
    return buffers
