"""The model as a writer of prompts: loaded before a run is laid out, asked, and let go of again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from tqdm.auto import tqdm

from engine.generation import generate_missing_responses
from engine.loading import load_for_training, release_memory
from options import UnlearnOptions
from prompts.formatter import PromptFormatter
from sources.rows import Row
from utils import pick_dtype

TEMPERATURE = 0.7  # greedy, a model names the same few things for every prompt
ANSWER_TOKENS = 96  # of a reply: five questions
Answer = Callable[[list[Row]], list[Row]]  # gives rows without a response the model's own


@contextlib.contextmanager
def writer(options: UnlearnOptions, tokenizer, device: torch.device, what: str) -> Iterator[Answer]:
    """Yield what gives rows the model's own answers. what: is written, as progress shows it.

    It is a model of its own: what it writes is known before the run's is laid out. Torch's random numbers are left as
    they were. A dry run keeps none of the answers.
    """
    cache_dir = None if options.dry_run or options.cache_dir == "none" else options.cache_dir
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model, fingerprint = load_for_training(options, device, pick_dtype(options.dtype, device))
        formatter = PromptFormatter.of(tokenizer, options.model_name, options, ANSWER_TOKENS)
        formatter.fit(model.config, ANSWER_TOKENS)
        loaded = [model]

        def answer(rows: list[Row]) -> list[Row]:
            return generate_missing_responses(
                rows, loaded[0], formatter, fingerprint=fingerprint, tokens=ANSWER_TOKENS, temperature=TEMPERATURE,
                seed=options.seed, batch_size=0, cache_dir=cache_dir,
                progress=lambda chunks: tqdm(chunks, desc=what, leave=False, disable=None),
            )  # fmt: skip

        yield answer
        del model
        loaded.clear()  # whoever still holds `answer` holds no model
    release_memory(device)
