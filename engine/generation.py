"""Ask a model: answer prompts in batches, and cache the answers that it gave to rows without a response."""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer

from engine.decoding import Decoder, chosen, decode, takes_buffers
from engine.processes import broadcast_from_main, is_sharded, parallel_map
from prompts.formatter import PromptFormatter
from sources.rows import Row
from utils import attention_window, free_memory_gib, log, read_json_lines, write_json_lines

BATCH_SIZE = 64  # prompts at once on a CPU
ANSWER_MEMORY = 0.6  # share of a GPU's free memory that a batch of answers may take, by its estimate


@torch.no_grad()
def generate(
    model, formatter: PromptFormatter, prompts: list[list[int]], *, max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, seed: int = 0, progress=None,
) -> list[tuple[str, bool]]:  # fmt: skip
    """Return one (text, complete) a prompt, in the prompts' order; complete: the model ended the answer by itself.

    prompts: token ids; max_new_tokens: tokens of an answer at most; batch_size: prompts answered at once (0: on a GPU
    as many as its memory takes, on a CPU 64).
    Greedy at temperature 0, else sampled. A sampled answer depends on `seed`, its prompt, and how often the prompt
    stands before it in `prompts`; it does not depend, but for rounding, on the prompts that share its batch.
    The model's generation_config.json (a repetition penalty, beams) is ignored, so that two models are asked alike.
    Each of several processes answers a share of the batches, and all get every answer; a split model needs every
    process in every batch. Prompts of like length are answered together, padded on the left. The tokens that all
    prompts begin with (the system message of a chat template) are read once, and their key-value cache is shared.
    """
    tokenizer, device = formatter.tokenizer, next(model.parameters()).device
    stop = formatter.stop_ids()
    settings = {}
    draws = _row_draws(prompts, seed, max_new_tokens) if temperature else None  # (P, new tokens)
    answers: list[tuple[str, bool]] = [("", True)] * len(prompts)
    split = is_sharded(model)
    chunks = _chunks(model, prompts, max_new_tokens, batch_size)
    was_training = model.training
    model.eval()  # gradient checkpointing, active in training mode, would switch the key-value cache off
    shared, cache = (0, None) if split else _shared_prefix_cache(model, prompts)
    by_buffers = not split and decodes_by_buffers(model)

    def answer(number: int, chunk: list[int]) -> list[list[int]]:
        try:
            return answer_at_once(chunk)
        except torch.OutOfMemoryError:
            if len(chunk) == 1 or split:  # processes of a split model must all ask the same chunk
                raise
        torch.cuda.empty_cache()
        half = len(chunk) // 2
        return answer(number, chunk[:half]) + answer(number, chunk[half:])

    def answer_at_once(chunk: list[int]) -> list[list[int]]:
        width = max(len(prompts[i]) for i in chunk)
        ids = torch.full((len(chunk), width), tokenizer.pad_token_id)  # (R, T): shared beginning, padding, the rest
        mask = torch.zeros_like(ids)
        for r, i in enumerate(chunk):
            begin = width - len(prompts[i]) + shared
            ids[r, :shared], ids[r, begin:] = torch.tensor(prompts[i][:shared]), torch.tensor(prompts[i][shared:])
            mask[r, :shared], mask[r, begin:] = 1, 1
        if cache is not None:
            settings["past_key_values"] = copy.deepcopy(cache)
            settings["past_key_values"].batch_repeat_interleave(len(chunk))
        chunk_draws = None if draws is None else draws[chunk].to(device)
        if by_buffers:
            decoder = Decoder(model, ids.to(device), mask.to(device), settings.get("past_key_values"), stop=stop,
                              pad=tokenizer.pad_token_id, new_tokens=max_new_tokens, draws=chunk_draws,
                              temperature=temperature)  # fmt: skip
            return decode(decoder, capture=device.type == "cuda").tolist()
        if draws is not None:
            settings["logits_processor"] = LogitsProcessorList([TemperatureSampler(temperature, chunk_draws, width)])
        return model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=max_new_tokens,
            eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, use_cache=True, **settings,
        )[:, width:].tolist()  # (R, new tokens)  # fmt: skip

    asked = progress(chunks) if progress else chunks
    with _plain_decoding(model):
        found = [answer(n, chunk) for n, chunk in enumerate(asked)] if split else parallel_map(asked, answer)
    for chunk, out in zip(chunks, found, strict=True):
        for i, tokens in zip(chunk, out, strict=True):
            end = next((t for t, token in enumerate(tokens) if token in stop), None)
            answers[i] = (formatter.read_answer(prompts[i], tokens[:end]), end is not None)
    model.train(was_training)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the batches' blocks have sizes that a training step has no use for
    return answers


@contextlib.contextmanager
def _plain_decoding(model):
    """Inside, replace the model's own generation settings by those of a model that has none: greedy decoding."""
    parts = [module for module in model.modules() if hasattr(module, "generation_config")]
    kept = [module.generation_config for module in parts]
    for module in parts:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(parts, kept, strict=True):
            module.generation_config = config


class TemperatureSampler(LogitsProcessor):
    """Sample by greedy decoding: leave one token a row possible, drawn from the softmax at `temperature`.

    draws (R, new tokens): uniform numbers in [0, 1), one for each token of each row's answer; width: tokens of the
    padded prompts.
    """

    def __init__(self, temperature: float, draws: torch.Tensor, width: int):
        self.temperature, self.draws, self.width = temperature, draws, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = chosen(scores, self.draws[:, input_ids.shape[1] - self.width, None], self.temperature)  # (R, 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def decodes_by_buffers(model) -> bool:
    """Say whether answers are decoded over buffers: on a GPU, for a model that keeps keys and values of all tokens."""
    return (next(model.parameters()).device.type == "cuda" and takes_buffers(model)
            and not attention_window(model.config) and keeps_all_tokens(model))  # fmt: skip


def keeps_all_tokens(model) -> bool:
    """Say whether each layer's cache is a plain one."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def _row_draws(prompts: list[list[int]], seed: int, count: int) -> torch.Tensor:
    """Return (P, count) uniform numbers in [0, 1): a row's depend on `seed`, its prompt, and the prompt's number among
    equal ones, so that a prompt that is asked several times gets several answers."""
    seen: dict[tuple, int] = collections.Counter()
    rows = np.empty((len(prompts), count), dtype=np.float32)
    for row, prompt in zip(rows, map(tuple, prompts), strict=True):
        key = hashlib.sha256(json.dumps([seed, seen[prompt], prompt]).encode()).digest()[:16]
        seen[prompt] += 1
        row[:] = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big"))).random(count, dtype=np.float32)
    return torch.from_numpy(rows)


def _chunks(model, prompts: list[list[int]], max_new_tokens: int, batch_size: int) -> list[list[int]]:
    """Group the prompts' numbers into batches to be answered together, the shortest prompts first.

    With a `batch_size`, that many short ones or fewer long ones (memory: number x length). Without one, a GPU gets as
    many as its free memory takes: it is the host's launches that a small model's token waits for, not the batch. No
    answer depends on who is asked together, so every process gets a share.
    """
    device, share = next(model.parameters()).device, len(prompts)
    if not is_sharded(model):
        share = max(1, -(-len(prompts) // PartialState().num_processes))
    by_memory = batch_size == 0 and device.type == "cuda"
    batch_size = min(batch_size or BATCH_SIZE, share)
    budget = ANSWER_MEMORY * (free_memory_gib(device) * 2**30 + _unused_bytes(device)) if by_memory else 0
    chunks: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):  # the last of a chunk is its longest
        number = len(chunks[-1]) + 1 if chunks else 1
        if by_memory:
            fits = number <= share and number * answer_bytes(model, len(prompts[i]), max_new_tokens) <= budget
        else:
            fits = number <= batch_size and number * len(prompts[i]) <= 64 * batch_size
        if chunks and fits:
            chunks[-1].append(i)
        else:
            chunks.append([i])
    return chunks


def answer_bytes(model, width: int, max_new_tokens: int) -> int:
    """Return the bytes that one prompt of `width` tokens takes while it is answered: keys and values (a layer's are
    copied in each step), the states of one layer while the prompt is read, and a row of logits as it is sampled."""
    config, size = (
        model.config.get_text_config(),
        next(p for p in model.parameters() if p.is_floating_point()).element_size(),
    )
    heads = getattr(config, "num_attention_heads", 1)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    a_token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_width
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = inner if isinstance(inner, int) else max(inner)
    in_fp32 = 4 * 6  # logits, softmax, its sums, and what is drawn
    return int(1.2 * size * a_token * (width + max_new_tokens) + size * width * (6 * config.hidden_size + 3 * inner)
               + config.vocab_size * (size + in_fp32))  # fmt: skip


def _unused_bytes(device: torch.device) -> int:
    """Return what torch holds of a GPU's memory without using it."""
    return torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _shared_prefix_cache(model, prompts: list[list[int]]):
    """Return (length, key-value cache) of the tokens that all prompts begin with; (0, None) if they cannot be shared.

    They can be shared if every layer keeps the keys and values of all tokens and each token's position is an input. A
    recurrent state (Mamba) would take padding for text, and so would a distance counted in columns (ALiBi).
    """
    first, last = min(prompts, default=[]), max(prompts, default=[])  # in order: all others lie between them
    length = next((t for t, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    length = min(length, min(map(len, prompts), default=1) - 1)  # something must be left to predict from
    if length < 8 or len(prompts) < 2 or attention_window(model.config) or not _knows_places(model):
        return 0, None
    ids = torch.tensor([first[:length]], device=next(model.parameters()).device)  # (1, shared)
    cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    plain = type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)
    return (length, cache) if plain else (0, None)


def _knows_places(model) -> bool:
    """Say whether the forward takes each token's position, as models with learned or rotary positions do."""
    return "position_ids" in inspect.signature(model.forward).parameters and not getattr(model.config, "alibi", False)


def generate_missing_responses(
    rows: list[Row], model, formatter: PromptFormatter, *, fingerprint: str, tokens: int, temperature: float, seed: int,
    batch_size: int, cache_dir: str | None, progress=None,
) -> list[Row]:  # fmt: skip
    """Return the rows; each row without a response gets the model's own answer of at most `tokens` tokens.

    The answers are sampled once and then read from `cache_dir` (None: no cache). The file is named by a hash of all
    that they depend on: weights (their `fingerprint`), dtype, prompts, end tokens, `tokens`, `temperature` and `seed`.
    """
    unanswered = {row.key: row for row in rows if row.response is None}
    missing = sorted(unanswered)
    if not missing:
        return rows
    prompts = [formatter.prompt_of(unanswered[key]) for key in missing]
    settings = [fingerprint, str(model.dtype), tokens, temperature, seed, *formatter.further_ends]
    key = hashlib.sha256(json.dumps([settings, prompts]).encode()).hexdigest()[:20]
    path = Path(cache_dir) / f"answers-{key}.jsonl" if cache_dir else None
    lines = None
    if path and path.is_file():
        lines = read_json_lines(path)
    lines = broadcast_from_main(lines)  # another process's disk may be another one
    if lines is not None:
        answers = {line["prompt"]: (line["response"], line["complete"]) for line in lines}
        log.info("loaded %d cached model answers from %s", len(missing), path)
    else:
        kept = f"prompts and answers are kept in {path}" if path else "they are not kept (--cache_dir none)"
        log.info("generating answers for %d prompts without a response; %s", len(missing), kept)
        given = generate(
            model, formatter, prompts, max_new_tokens=tokens, batch_size=batch_size,
            temperature=temperature, seed=seed, progress=progress,
        )  # fmt: skip
        formatter.warn_of_unfinished_thoughts("own answers", "--max_answer_tokens")
        answers = dict(zip(missing, given, strict=True))
        if path and PartialState().is_main_process:
            write_json_lines(path, ({"prompt": p, "response": a, "complete": c} for p, (a, c) in answers.items()))
    return [
        row if row.response is not None
        else dataclasses.replace(row, response=answers[row.key][0], complete=answers[row.key][1])
        for row in rows
    ]  # fmt: skip
