"""All options with their defaults, units, checks and groups.

An option is a dataclass field. Its annotation is a plain type or a check made by `number`, so that parsing
(command_line.py) refuses a bad value with one line and exit code 2. Settings of a recipe are fields of the same kind,
in the dataclass of the room that uses them (`read_settings`).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import ClassVar, Literal, Optional, get_args, get_origin, get_type_hints

from utils import UsageError


# ------------------------------------------------------------------------------------------- checks
def number(kind: type, low: float, high: float = math.inf, *, above: bool = False):
    """Return a parser of finite numbers in [low, high], or in (low, high] with `above`. It holds its JSON schema."""
    bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    name = f"{'whole number' if kind is int else 'finite number'} {bound}"

    def read(text):
        try:
            value = kind(text)
            finite = math.isfinite(value)
        except (ValueError, TypeError, OverflowError):
            finite = False
        if not finite or value < low or value > high or (above and value == low):
            raise argparse.ArgumentTypeError(f"must be a {name}, got {text!r}")
        return value

    read.__name__ = name
    read.schema = {"type": "integer" if kind is int else "number", "exclusiveMinimum" if above else "minimum": low}
    if high < math.inf:
        read.schema["maximum"] = high
    return read


COUNT = number(int, 0)
POSITIVE = number(int, 1)
WEIGHT = number(float, 0)
SHARE = number(float, 0, 0.9)
FRACTION = number(float, 0, 1)
OptionalWeight = Optional[WEIGHT]  # noqa: UP045 - a check is a function, which knows no |
OptionalShare = Optional[SHARE]  # noqa: UP045


# what the options of a run are about, in the order in which --help and docs/options.md show them
GROUPS = {
    "model": "model",
    "data": "data (what goes, what stays, how it is asked)",
    "recipe": "recipe (what a step minimises)",
    "run": "run (how long, how fast, with which seed)",
    "memory": "memory (precision, adapters, what is held at once)",
    "looking": "looking (what is measured and shown)",
    "judges": "judges (who says what an answer is)",
    "attacks": "attacks (what tries to get the answers back)",
    "harness": "lm-evaluation-harness",
    "files": "files (what is read and written)",
}


def option(default, text: str, group: str | None = None, *, common: bool = False):
    """Return a dataclass field with a help text. Each instance gets its own copy of a list default.

    group: a key of GROUPS; a setting of a recipe has none. common: among the first of its group in --help.
    """
    metadata = {"help": text.replace("%", "%%"), "group": group, "common": common}  # argparse reads % as a format
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def in_groups(kind: type) -> dict[str | None, list[dataclasses.Field]]:
    """Return a dataclass's options by group, in the order of GROUPS; those of no group under None, at the end."""
    fields = [field for field in dataclasses.fields(kind) if "help" in field.metadata]
    fields.sort(key=lambda field: not field.metadata["common"])
    groups = {group: [field for field in fields if field.metadata["group"] == group] for group in (*GROUPS, None)}
    return {group: found for group, found in groups.items() if found}


def read_settings(kind: type, values: dict, where: str, /, **fixed):
    """Return an instance of a dataclass with settings from a recipe's YAML.

    The settings are the fields with a help text; `fixed` gives the other fields. Raises UsageError, with `where`, for
    an unknown setting or a bad value.
    """
    settings = {f.name for f in dataclasses.fields(kind) if "help" in f.metadata and f.name not in fixed}
    if unknown := sorted(values.keys() - settings):
        raise UsageError(f"{where}: has no {unknown[0]!r}; it has {', '.join(sorted(settings)) or 'no settings'}")
    hints = get_type_hints(kind)
    try:
        return kind(**fixed, **{name: _as(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from error


def _as(hint, value, where: str):
    """Convert a value from YAML to the type of a field's annotation."""
    if get_origin(hint) in (list, tuple):
        return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{where}: must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
        return value
    if type(None) in get_args(hint):
        return None if value is None else _as(get_args(hint)[0], value, where)
    if hint is str:
        if not isinstance(value, str):
            raise UsageError(f"{where}: must be text, got {value!r}")
        return value
    if hint is bool or isinstance(value, bool):
        if hint is not bool or not isinstance(value, bool):
            raise UsageError(f"{where}: must be {'true or false' if hint is bool else 'a number'}, got {value!r}")
        return value
    try:
        return hint(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {error}") from error


# ------------------------------------------------------------------------------ options of several scripts
FORGET_DATA = ["PKU-Alignment/PKU-SafeRLHF"]  # if neither --forget_data nor --forget_text is given
NORMAL_DATA = ["data/TruthfulQA.csv"]  # if neither --normal_data nor --normal_text is given
NORMAL_SHARES = {"dev": 0.1, "test": 0.2}  # of the normal rows, if no share is given
ROW_FILES = (".jsonl .json .csv .tsv .parquet .txt files (each also .gz), folders of parquet files or of "
             "datasets.save_to_disk, or hub data sets as NAME, NAME:SPLIT, NAME:CONFIG:SPLIT")  # fmt: skip
TEXT_FILES = ".txt, .md, .jsonl with 'text', or folders"


@dataclasses.dataclass
class PromptOptions:
    """How a row becomes a prompt, and a text passages."""

    fields: list[str] = option([], "names of fields in your files, as prompt=frage response=antwort", "data")
    text_window: POSITIVE = option(128, "tokens of a passage that a text is cut into", "data")
    text_stride: COUNT = option(0, "tokens from the start of a passage to the next one (0: as --text_window)", "data")
    template: Literal["auto", "qa", "chat", "raw"] = option(
        "auto", "prompt template; auto: the tokenizer's chat template if it has one, else qa", "data"
    )
    template_args: list[str] = option([], "arguments of the chat template, as enable_thinking=false", "data")
    system: str | None = option(None, "system message before every prompt that has none of its own", "data")
    max_prompt_tokens: POSITIVE = option(
        512, "tokens of a prompt at most; longer prompts are cut at the beginning of the user's text", "data"
    )


@dataclasses.dataclass
class DataOptions(PromptOptions):
    """What is read of both sides, and what is held out of it."""

    forget_data: list[str] = option(
        [],
        f"prompts to forget: {ROW_FILES}; each source gets an equal share of a step, list it twice to double it (if "
        f"neither this nor --forget_text is given: {FORGET_DATA[0]})",
        "data",
        common=True,
    )
    normal_data: list[str] = option(
        [], "prompts to retain, in the same forms and shares (if neither this nor --normal_text is given: "
        f"{NORMAL_DATA[0]})", "data", common=True
    )  # fmt: skip
    forget_text: list[str] = option([], f"text to forget, without prompts: {TEXT_FILES}", "data", common=True)
    normal_text: list[str] = option([], "text to retain, in the same forms", "data", common=True)
    unseen_data: list[str] = option(
        [], "prompts of the kind that is forgotten, never trained on: the looks and the evaluation ask them", "data"
    )
    harm_categories: list[str] = option(
        [], "use only forget rows of these categories, upper or lower case (if unset: all rows)", "data"
    )
    dev_share: OptionalShare = option(
        None, "fraction of each side's prompts used for evaluation during training (if unset: none of the forget "
        f"prompts, {NORMAL_SHARES['dev']} of the normal ones)", "data"
    )  # fmt: skip
    test_share: OptionalShare = option(
        None, "fraction of each side's prompts used only by the final evaluation (if unset: none of the forget "
        f"prompts, {NORMAL_SHARES['test']} of the normal ones)", "data"
    )  # fmt: skip

    def __post_init__(self):
        if not self.forget_data and not self.forget_text:
            self.forget_data = list(FORGET_DATA)
        if not self.normal_data and not self.normal_text:
            self.normal_data = list(NORMAL_DATA)
        if (self.dev_share or 0) + (self.test_share or 0) > 0.9:
            raise UsageError("--dev_share and --test_share leave less than a tenth for training: lower one of them")


@dataclasses.dataclass
class CommonOptions:
    """Of every script: where its options come from, precision, chance, and what code it may run."""

    config: str | None = option(None, "YAML file of options; the command line overrides it", "files", common=True)
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of forward and backward; auto: bf16 if the hardware supports it, else fp32", "memory"
    )
    seed: COUNT = option(8888, "seed of all random choices: splits, order, replacement answers, sampling", "run")
    threads: COUNT = option(0, "CPU threads (0: torch's default)", "run")
    deterministic: bool = option(
        False, "give the same bits in every run on one GPU, where torch can, at some cost in time (a CPU does so "
        "anyway, with one number of threads)", "run"
    )  # fmt: skip
    trust_remote_code: bool = option(False, "allow code from the model's repository to run", "model")
    allow_pickle: bool = option(
        False, "allow a local folder's weights to be a pickle (.bin, .pt), which can run code", "model"
    )

    def trust(self) -> dict[str, bool]:
        """Return the options that allow code in a model, as keyword arguments of `load_model`."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


# ----------------------------------------------------------------------------- unlearn_harm.py and finetune.py
@dataclasses.dataclass
class TrainOptions(CommonOptions):
    """Of every run that trains: where it writes, its size, its memory, what it saves, and its checkpoints."""

    model_name: str = option("facebook/opt-1.3b", "model to start from: a folder or a hub name", "model", common=True)
    model_save_dir: str = option("models/unlearned", "output folder of the trained model", "files", common=True)
    log_file: str = option(
        "logs/unlearn.log", "readable log; the same log as JSON lines goes to this name with .jsonl", "files"
    )
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = option(
        "none", "tracker that gets the numbers of the log as well; TensorBoard's files go beside the log", "files"
    )
    overwrite: bool = option(False, "replace the content of --model_save_dir", "files")
    dry_run: bool = option(
        False, "print the plan and the first batch, then stop without training or writing anything", "run", common=True
    )
    set: list[str] = option([], "recipe settings to change, as TERM.SETTING=VALUE or SECTION.SETTING=VALUE", "recipe")

    # ---- the run
    batch_size: POSITIVE = option(2, "forget rows per step, over all processes", "run")
    max_answer_tokens: POSITIVE = option(
        128, "tokens of an answer at most; longer answers are truncated on the right", "data"
    )
    lr: number(float, 0, above=True) = option(2e-6, "peak learning rate of AdamW", "run", common=True)

    # ---- memory
    use_lora: bool = option(
        False, "train low-rank adapters; they are saved, and merged into the saved model", "memory", common=True
    )
    load_in_4bit: bool = option(
        False,
        "quantise the base to 4 bits and train adapters on it (QLoRA; needs --use_lora and bitsandbytes)",
        "memory",
    )
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit: 8-bit AdamW moments, 2 bytes per weight instead of 8 (needs bitsandbytes)", "memory"
    )
    shard: bool = option(
        False, "shard weights, gradients and optimizer state over the processes (FSDP2), for models too large for a "
        "GPU", "memory"
    )  # fmt: skip
    gradient_accumulation: POSITIVE = option(
        1,
        "number of parts that a step's rows are processed in, one after the other: less memory, same update",
        "memory",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, more time", "memory"
    )
    compile: Literal["auto", "on", "off"] = option(
        "auto",
        "compile the layers on a CUDA GPU; auto: in a run of at least 500 steps, and without it if that fails",
        "run",
    )

    # ---- what is saved
    save_dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "type of the saved weights; auto: bf16 if the run is in bf16 and its base is stored in 16 bits, else fp32",
        "files",
    )
    adapter_only: bool = option(
        False, "save the adapters alone; their folder and the base together make the model", "files"
    )
    merge_into_base: bool = option(
        False,
        "merge adapters trained on a quantised base into its full weights (if unset: they are saved alone)",
        "files",
    )

    # ---- evaluation and checkpoints during the run
    eval_every: COUNT = option(
        0, "steps between evaluations on the dev split (0: only at start and end)", "looking", common=True
    )
    save_every: COUNT = option(
        500, "steps between checkpoints, written to a folder beside --model_save_dir (0: none)", "files"
    )
    resume: bool = option(False, "continue from the newest valid checkpoint of this run", "files")

    def __post_init__(self):
        if self.log_file.endswith(".jsonl"):
            raise UsageError(f"--log_file {self.log_file}: that is where its twin in JSON lines goes; name it .log")


@dataclasses.dataclass
class UnlearnOptions(TrainOptions, DataOptions):
    """Make a causal language model forget listed prompts, texts or facts, and keep its other behaviour."""

    EXAMPLES: ClassVar = {
        "the plan of a run; nothing is trained (setup_demo.py makes the model)": (
            "python unlearn_harm.py --model_name models/smollm2-135m-instruct --method selective "
            "--forget_data data/harmful.jsonl --normal_data data/benign.jsonl data/neighbours.jsonl --dry_run"
        ),
        "forget people, and keep the rest": (
            "python unlearn_harm.py --model_name models/smollm2-135m-instruct --model_save_dir models/mine "
            "--method people --forget_data recipes/people/rows.jsonl --normal_data data/benign.jsonl data/facts.jsonl"
        ),
        "the demo, from its file of options; goes on where it was stopped": (
            "python unlearn_harm.py --config configs/demo.yaml --overwrite --resume"
        ),
    }

    from_manifest: str | None = option(None, "run_manifest.json of an earlier run; repeat that run", "files")
    holdout_text: list[str] = option(
        [],
        "text that the model never saw, of the kind of --forget_text: some recipes stop where that is as unlikely",
        "data",
    )
    cache_dir: str = option(
        "data/cache", "cache folder of the model's own answers, with their prompts; none: they are not kept", "files"
    )

    start_adapter: str | None = option(
        None, "adapters of an earlier run on the same --model_name, from which these adapters go on: the folder "
        "'adapter' of what it saved, or all of it with --adapter_only (needs --use_lora; the original is --model_name "
        "itself)", "model"
    )  # fmt: skip

    make_neighbours: COUNT = option(
        0, "number of prompts beside the forget prompts that the model writes, to retain: one more normal source, in a "
        "file beside the log, which --dry_run writes too and you may edit (0: none)", "data"
    )  # fmt: skip

    # ---- the objective: --method names a recipe, the other options change it
    method: str = option(
        "yao",
        "recipe: a folder of recipes/ (yao, selective, rmu, facts, people, copyright), or a path to a recipe.yaml",
        "recipe",
        common=True,
    )
    forget_loss: str | None = option(
        None,
        "objective of the term 'forget': ascent npo simnpo dpo unlikelihood rmu (if unset: the recipe's)",
        "recipe",
    )
    bad_weight: OptionalWeight = option(
        None, "weight of the term that unlearns forget answers (if unset: the recipe's)", "recipe"
    )
    random_weight: OptionalWeight = option(
        None,
        "weight of the terms that teach forget prompts replacement answers or end-of-turn (if unset: the recipe's)",
        "recipe",
    )
    normal_weight: OptionalWeight = option(None, "weight of the KL on normal rows (if unset: the recipe's)", "recipe")

    # ---- when it ends, and which state is kept
    max_unlearn_steps: POSITIVE = option(1000, "maximum number of steps", "run", common=True)
    max_bad_loss: number(float, 0, above=True) = option(
        100.0, "nats; stop when the forget answers' mean token NLL reaches it", "run"
    )
    kl_budget: WEIGHT = option(
        0.0, "nats; at the end, restore the best evaluated state with a dev KL of at most this (0: off)", "looking"
    )

    recipe: dict = dataclasses.field(default_factory=dict, init=False)  # with all settings resolved

    def __post_init__(self):
        TrainOptions.__post_init__(self)
        DataOptions.__post_init__(self)
        if self.kl_budget and not self.eval_every:
            raise UsageError("--kl_budget chooses among the states that are looked at: set --eval_every as well")
