"""The options of finetune.py, and the run that they stand for: the rows to learn on the normal side, nothing to forget.

Everything else of that run (steps, memory, checkpoints, what is saved) is as in unlearn_harm.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Optional

from command_line import words_of
from data_module import Sides, split_sides
from options import (
    COUNT,
    POSITIVE,
    ROW_FILES,
    SHARE,
    TEXT_FILES,
    PromptOptions,
    TrainOptions,
    UnlearnOptions,
    number,
    option,
)
from prompts.formatter import PromptFormatter
from prompts.tokenizer import load_tokenizer
from prompts.windows import TextCutter
from run.parsing import parse_run
from sources.rows import read_sources, read_texts
from utils import UsageError

METHOD = "finetune"  # the recipe's folder
OptionalSteps = Optional[POSITIVE]  # noqa: UP045 - a check is a function, which knows no |


@dataclasses.dataclass
class FinetuneOptions(TrainOptions, PromptOptions):
    """Teach a causal language model rows or text: the opposite of unlearning, on the same engine."""

    EXAMPLES: ClassVar = {
        "teach rows (setup_demo.py makes the model)": (
            "python finetune.py --model_name models/smollm2-135m-instruct --model_save_dir models/taught "
            "--data recipes/people/rows.jsonl"
        ),
        "teach a text by heart": (
            "python finetune.py --model_name models/smollm2-135m-instruct --model_save_dir models/reader "
            "--text data/planted/story.txt --epochs 10"
        ),
        "the planted model, from its file of options (after setup_planted.py)": (
            "python finetune.py --config configs/planted.yaml --overwrite --resume"
        ),
    }

    data: list[str] = option([], f"rows to learn, prompts with answers: {ROW_FILES}", "data", common=True)
    text: list[str] = option([], f"text to learn, without prompts: {TEXT_FILES}", "data", common=True)
    dev_share: SHARE = option(0.0, "fraction of the rows that are not learned, but looked at on the way", "data")
    test_share = 0.0  # of no option: nothing is held out for an evaluation
    epochs: number(float, 0, above=True) = option(3.0, "number of times that every row is learned", "run", common=True)
    max_steps: OptionalSteps = option(None, "number of steps, in place of --epochs", "run")
    model_save_dir: str = option("models/finetuned", "output folder of the trained model", "files", common=True)
    log_file: str = option(
        "logs/finetune.log", "readable log; the same log as JSON lines goes to this name with .jsonl", "files"
    )
    batch_size: POSITIVE = option(8, "rows per step, over all processes", "run")
    lr: number(float, 0, above=True) = option(2e-5, "peak learning rate of AdamW (with --use_lora, ten times as much "
                                                    "is usual)", "run", common=True)  # fmt: skip
    save_every: COUNT = option(
        0, "steps between checkpoints, written to a folder beside --model_save_dir (0: none)", "files"
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.data and not self.text:
            raise UsageError("nothing to learn: name rows with --data or text with --text")


def read_rows_to_learn(options: FinetuneOptions) -> Sides:
    """Read the rows and texts, as the normal side of a run. Raises UsageError for a row without an answer."""
    sources = read_sources(options.data, "--data", fields=options.fields)
    for source in sources:
        if missing := [number for number, row in enumerate(source.rows, 1) if row.response is None]:
            raise UsageError(f"--data {source.spec}, row {missing[0]}: has no answer to learn ({len(missing)} of "
                             f"{len(source.rows)} rows have none); give rows with answers, or text as "
                             "--text")  # fmt: skip
    return Sides([], sources + read_texts(options.text, "--text", options.fields), [])


def as_run(options: FinetuneOptions, sides: Sides) -> UnlearnOptions:
    """Return the options of the run that learns these rows. Raises UsageError for a --set that the recipe lacks."""
    shared = {field.name for kind in (TrainOptions, PromptOptions) for field in dataclasses.fields(kind)} - {"config"}
    words = {name: getattr(options, name) for name in sorted(shared)}
    words |= {"method": METHOD, "normal_data": options.data, "normal_text": options.text,
              "dev_share": options.dev_share, "test_share": options.test_share,
              "max_unlearn_steps": options.max_steps or count_steps(options, sides)}  # fmt: skip
    run = parse_run(words_of(words))
    run.forget_data = []  # which has a default
    return run


def count_steps(options: FinetuneOptions, sides: Sides) -> int:
    """Return the steps of --epochs: each takes --batch_size of the rows and of the passages of the texts."""
    tokenizer = load_tokenizer(options.model_name, trust_remote_code=options.trust_remote_code)
    formatter = PromptFormatter.of(tokenizer, options.model_name, options, options.max_answer_tokens)
    parts = split_sides(sides, options, TextCutter.of(formatter, options))
    rows = sum(len(source["train"]) for source in parts["normal"])
    return max(1, math.ceil(options.epochs * rows / options.batch_size))
