"""All options with their defaults, units and checks, and the parsing of YAML files and command lines.

An option is a dataclass field. Its annotation is a plain type or a check made by `number`, so that parsing refuses a
bad value with one line and exit code 2. Settings of a recipe are fields of the same kind, in the dataclass of the room
that uses them (`read_settings`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import sys
from pathlib import Path
from typing import Literal, Optional, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from utils import UsageError


# ------------------------------------------------------------------------------------------- checks
def number(kind: type, low: float, high: float = math.inf, *, above: bool = False):
    """Return a parser of finite numbers in [low, high], or in (low, high] with `above`."""
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
    return read


COUNT = number(int, 0)
POSITIVE = number(int, 1)
WEIGHT = number(float, 0)
SHARE = number(float, 0, 0.9)
FRACTION = number(float, 0, 1)
OptionalWeight = Optional[WEIGHT]  # noqa: UP045 - a check is a function, which knows no |
OptionalShare = Optional[SHARE]  # noqa: UP045


def option(default, text: str):
    """Return a dataclass field with a help text. Each instance gets its own copy of a list default."""
    metadata = {"help": text.replace("%", "%%")}  # which argparse reads as a format
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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

    fields: list[str] = option([], "names of fields in your files, as prompt=frage response=antwort")
    text_window: POSITIVE = option(128, "tokens of a passage that a text is cut into")
    text_stride: COUNT = option(0, "tokens from the start of a passage to the next one (0: as --text_window)")
    template: Literal["auto", "qa", "chat", "raw"] = option(
        "auto", "prompt template; auto: the tokenizer's chat template if it has one, else qa"
    )
    template_args: list[str] = option([], "arguments of the chat template, as enable_thinking=false")
    system: str | None = option(None, "system message before every prompt that has none of its own")
    max_prompt_tokens: POSITIVE = option(
        512, "tokens of a prompt at most; longer prompts are cut at the beginning of the user's text"
    )


@dataclasses.dataclass
class DataOptions(PromptOptions):
    """What is read of both sides, and what is held out of it."""

    forget_data: list[str] = option(
        [],
        f"prompts to forget: {ROW_FILES}; each source gets an equal share of a step, list it twice to double it (if "
        f"neither this nor --forget_text is given: {FORGET_DATA[0]})",
    )
    normal_data: list[str] = option(
        [], "prompts to retain, in the same forms and shares (if neither this nor --normal_text is given: "
        f"{NORMAL_DATA[0]})"
    )  # fmt: skip
    forget_text: list[str] = option([], f"text to forget, without prompts: {TEXT_FILES}")
    normal_text: list[str] = option([], "text to retain, in the same forms")
    unseen_data: list[str] = option(
        [], "prompts of the kind that is forgotten, never trained on: the looks and the evaluation ask them"
    )
    harm_categories: list[str] = option(
        [], "use only forget rows of these categories, upper or lower case (if unset: all rows)"
    )
    dev_share: OptionalShare = option(
        None, "fraction of each side's prompts used for evaluation during training (if unset: none of the forget "
        f"prompts, {NORMAL_SHARES['dev']} of the normal ones)"
    )  # fmt: skip
    test_share: OptionalShare = option(
        None, "fraction of each side's prompts used only by the final evaluation (if unset: none of the forget "
        f"prompts, {NORMAL_SHARES['test']} of the normal ones)"
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

    config: str | None = option(None, "YAML file of options; the command line overrides it")
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of forward and backward; auto: bf16 if the hardware supports it, else fp32"
    )
    seed: COUNT = option(8888, "seed of all random choices: splits, order, replacement answers, sampling")
    threads: COUNT = option(0, "CPU threads (0: torch's default)")
    deterministic: bool = option(
        False, "give the same bits in every run on one GPU, where torch can, at some cost in time (a CPU does so "
        "anyway, with one number of threads)"
    )  # fmt: skip
    trust_remote_code: bool = option(False, "allow code from the model's repository to run")
    allow_pickle: bool = option(False, "allow a local folder's weights to be a pickle (.bin, .pt), which can run code")

    def trust(self) -> dict[str, bool]:
        """Return the options that allow code in a model, as keyword arguments of `load_model`."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


# ----------------------------------------------------------------------------- unlearn_harm.py and finetune.py
@dataclasses.dataclass
class TrainOptions(CommonOptions):
    """Of every run that trains: where it writes, its size, its memory, what it saves, and its checkpoints."""

    model_name: str = option("facebook/opt-1.3b", "model to start from: a folder or a hub name")
    model_save_dir: str = option("models/unlearned", "output folder of the trained model")
    log_file: str = option("logs/unlearn.log", "readable log; the same log as JSON lines goes to this name with .jsonl")
    report_to: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = option(
        "none", "tracker that gets the numbers of the log as well; TensorBoard's files go beside the log"
    )
    overwrite: bool = option(False, "replace the content of --model_save_dir")
    dry_run: bool = option(False, "print the plan and the first batch, then stop without training or writing anything")
    set: list[str] = option([], "recipe settings to change, as TERM.SETTING=VALUE or SECTION.SETTING=VALUE")

    # ---- the run
    batch_size: POSITIVE = option(2, "forget rows per step, over all processes")
    max_answer_tokens: POSITIVE = option(128, "tokens of an answer at most; longer answers are truncated on the right")
    lr: number(float, 0, above=True) = option(2e-6, "peak learning rate of AdamW")

    # ---- memory
    use_lora: bool = option(False, "train low-rank adapters; they are saved, and merged into the saved model")
    load_in_4bit: bool = option(
        False, "quantise the base to 4 bits and train adapters on it (QLoRA; needs --use_lora and bitsandbytes)"
    )
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit: 8-bit AdamW moments, 2 bytes per weight instead of 8 (needs bitsandbytes)"
    )
    shard: bool = option(
        False, "shard weights, gradients and optimizer state over the processes (FSDP2), for models too large for a GPU"
    )  # fmt: skip
    gradient_accumulation: POSITIVE = option(
        1, "number of parts that a step's rows are processed in, one after the other: less memory, same update"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "compile the layers on a CUDA GPU; auto: in a run of at least 500 steps, and without it if that fails"
    )

    # ---- what is saved
    save_dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto",
        "type of the saved weights; auto: bf16 if the run is in bf16 and its base is stored in 16 bits, else fp32",
    )
    adapter_only: bool = option(False, "save the adapters alone; their folder and the base together make the model")
    merge_into_base: bool = option(
        False, "merge adapters trained on a quantised base into its full weights (if unset: they are saved alone)"
    )

    # ---- evaluation and checkpoints during the run
    eval_every: COUNT = option(0, "steps between evaluations on the dev split (0: only at start and end)")
    save_every: COUNT = option(500, "steps between checkpoints, written to a folder beside --model_save_dir (0: none)")
    resume: bool = option(False, "continue from the newest valid checkpoint of this run")

    def __post_init__(self):
        if self.log_file.endswith(".jsonl"):
            raise UsageError(f"--log_file {self.log_file}: that is where its twin in JSON lines goes; name it .log")


@dataclasses.dataclass
class UnlearnOptions(TrainOptions, DataOptions):
    from_manifest: str | None = option(None, "run_manifest.json of an earlier run; repeat that run")
    holdout_text: list[str] = option(
        [], "text that the model never saw, of the kind of --forget_text: some recipes stop where that is as unlikely"
    )
    cache_dir: str = option(
        "data/cache", "cache folder of the model's own answers, with their prompts; none: they are not kept"
    )

    start_adapter: str | None = option(
        None, "adapters of an earlier run on the same --model_name, from which these adapters go on: the folder "
        "'adapter' of what it saved, or all of it with --adapter_only (needs --use_lora; the original is --model_name "
        "itself)"
    )  # fmt: skip

    make_neighbours: COUNT = option(
        0, "number of prompts beside the forget prompts that the model writes, to retain: one more normal source, in a "
        "file beside the log, which --dry_run writes too and you may edit (0: none)"
    )  # fmt: skip

    # ---- the objective: --method names a recipe, the other options change it
    method: str = option(
        "yao",
        "recipe: a folder of recipes/ (yao, selective, rmu, facts, people, copyright), or a path to a recipe.yaml",
    )
    forget_loss: str | None = option(
        None, "objective of the term 'forget': ascent npo simnpo dpo unlikelihood rmu (if unset: the recipe's)"
    )
    bad_weight: OptionalWeight = option(
        None, "weight of the term that unlearns forget answers (if unset: the recipe's)"
    )
    random_weight: OptionalWeight = option(
        None,
        "weight of the terms that teach forget prompts replacement answers or end-of-turn (if unset: the recipe's)",
    )
    normal_weight: OptionalWeight = option(None, "weight of the KL on normal rows (if unset: the recipe's)")

    # ---- when it ends, and which state is kept
    max_unlearn_steps: POSITIVE = option(1000, "maximum number of steps")
    max_bad_loss: number(float, 0, above=True) = option(
        100.0, "nats; stop when the forget answers' mean token NLL reaches it"
    )
    kl_budget: WEIGHT = option(
        0.0, "nats; at the end, restore the best evaluated state with a dev KL of at most this (0: off)"
    )

    recipe: dict = dataclasses.field(default_factory=dict, init=False)  # with all settings resolved

    def __post_init__(self):
        TrainOptions.__post_init__(self)
        DataOptions.__post_init__(self)
        if self.kl_budget and not self.eval_every:
            raise UsageError("--kl_budget chooses among the states that are looked at: set --eval_every as well")


# ---------------------------------------------------------------------------------------------- parsing
class OneLineParser(HfArgumentParser):
    """An argument parser that reports an error in one line, without the usage text, and exits with 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}{self._nearest(message)} (--help lists every option)\n")

    def _nearest(self, message: str) -> str:
        """Return the question whether the option that is nearest to an unknown one was meant; "" if none is near."""
        unknown = re.match(r"unrecognized arguments: --(\w+)", message)
        names = [name[2:] for name in self._option_string_actions if name.startswith("--") and name[:5] != "--no_"]
        near = nearest(unknown[1], names) if unknown else None
        return f"; did you mean --{near}?" if near else ""


def nearest(name: str, names: list[str]) -> str | None:
    """Return the name that was probably meant: spelled nearly so, or the only one in which all parts begin words."""
    if close := difflib.get_close_matches(name, names, n=1, cutoff=0.8):
        return close[0]
    parts = name.split("_")
    holding = [
        other for other in names if all(any(word.startswith(part) for word in other.split("_")) for part in parts)
    ]
    return holding[0] if len(holding) == 1 else None


def parse(options_class: type, argv: list[str] | None = None):
    """Read the options from a YAML file (`--config`) and the command line, which overrides the file.

    The file's options are put before the real arguments, so both pass the same checks. This also reads `1e-5`, which
    is text in YAML, as a number. run/parsing.py adds the recipe of a run.
    """
    argv = underscored(sys.argv[1:] if argv is None else argv)
    parser = OneLineParser(options_class, allow_abbrev=False)
    arguments = config_words(options_class, argv) + argv
    return options_class(**vars(parser.parse_args(arguments)))


def underscored(argv: list[str]) -> list[str]:
    """Return the arguments with option names as they are spelled here: --use-lora=no as --use_lora=no."""
    parts = [word.partition("=") if word.startswith("--") else ("", "", word) for word in argv]
    return [name.replace("-", "_").replace("__", "--", 1) + sign + value for name, sign, value in parts]


def config_words(options_class: type, argv: list[str], also: frozenset[str] = frozenset()) -> list[str]:
    """Return the options in the `--config` file as arguments; `also`: names allowed beside the options."""
    path = peek(argv, "config")
    known = {f.name for f in dataclasses.fields(options_class) if f.init} - {"config"} | also
    return _yaml_words(path, known) if path else []


def peek(argv: list[str], name: str, kind=str, const=None):
    """Return one option's value before the others are read: None if it is not given, `const` if it has no value."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?", type=kind, const=const)
    return getattr(parser.parse_known_args(argv)[0], name)


def words_of(content: dict) -> list[str]:
    """Return options and their values as command-line arguments; None and empty lists are left out."""
    arguments = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if value is not None and values:
            arguments += [f"--{key}", *(str(v) for v in values)]
    return arguments


def read_yaml(path: str | Path, option: str) -> dict:
    """Read a YAML file of 'name: value' lines. Raises UsageError, with `option`."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{option} {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--{option} {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--{option} {path}: must hold one 'name: value' a line")
    return content


def _yaml_words(path: str, known: set[str]) -> list[str]:
    """Return the options in a YAML file as arguments. Raises UsageError for a name that is not in `known`."""
    content = read_yaml(path, "config")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}")
        if any(isinstance(v, dict | list) for v in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: option {key!r} must be a value or a list of values")
    return words_of(content)
