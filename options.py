"""Every option, its one default, its unit and its check; how recipe, YAML file and command line meet.

An option is a dataclass field. Its annotation is either a plain type or a check made by `number`, so that a bad value
is refused while the command line is read, with exit code 2 and one line. Settings of a recipe are fields of the same
kind, in the dataclass of the room that reads them (`read_settings`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Literal, Optional, get_args, get_origin, get_type_hints

import yaml
from transformers.hf_argparser import HfArgumentParser

from utils import UsageError


# ------------------------------------------------------------------------------------------- checks
def number(kind: type, low: float, high: float = math.inf, *, above: bool = False):
    """A reader for a finite number in [low, high], or (low, high] with `above`."""
    bound = f"{'above' if above else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    name = f"{'whole number' if kind is int else 'finite number'} {bound}"

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or value > high or (above and value == low):
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


def option(default, text: str):
    """A field with its help text; a list default is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


def read_settings(kind: type, values: dict, where: str, /, **fixed):
    """An instance of a dataclass from a recipe's YAML: its fields with a help text are the settings. `fixed`: the
    others. Raises UsageError, with `where`, for a name that it does not have and for a bad value."""
    settings = {f.name for f in dataclasses.fields(kind) if "help" in f.metadata and f.name not in fixed}
    if unknown := sorted(values.keys() - settings):
        raise UsageError(f"{where}: has no {unknown[0]!r}; it has {', '.join(sorted(settings)) or 'no settings'}")
    hints = get_type_hints(kind)
    try:
        return kind(**fixed, **{name: _as(hints[name], value, f"{where}.{name}") for name, value in values.items()})
    except argparse.ArgumentTypeError as error:
        raise UsageError(str(error)) from error


def _as(hint, value, where: str):
    """A value from YAML as a field's annotation wants it."""
    if get_origin(hint) in (list, tuple):
        return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UsageError(f"{where}: must be one of {', '.join(map(str, get_args(hint)))}, got {value!r}")
        return value
    if type(None) in get_args(hint):
        return None if value is None else _as(get_args(hint)[0], value, where)
    if hint is bool or isinstance(value, bool):
        if hint is not bool or not isinstance(value, bool):
            raise UsageError(f"{where}: must be {'true or false' if hint is bool else 'a number'}, got {value!r}")
        return value
    try:
        return hint(str(value))
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where}: {error}") from error


# ------------------------------------------------------------------------------ options of both scripts
@dataclasses.dataclass
class CommonOptions:
    config: str | None = option(None, "YAML file of options; what the command line says wins over it")
    forget_data: list[str] = option(
        ["PKU-Alignment/PKU-SafeRLHF"],
        "what to forget: local .jsonl/.json/.csv/.parquet/.txt files, or hub names as NAME or NAME:SPLIT; each source "
        "gets the same share of a step (named twice: twice the share)",
    )  # fmt: skip
    normal_data: list[str] = option(["data/TruthfulQA.csv"], "what to keep, in the same forms and shares")
    harm_categories: list[str] = option(
        [], "keep only the forget rows of these categories (none named: all rows; case does not matter)"
    )
    template: Literal["auto", "qa", "chat", "raw"] = option(
        "auto", "how a prompt is put to the model; auto: its chat template where it has one, else qa"
    )
    dev_share: SHARE = option(0.1, "share of the prompts that a run looks at while it trains, never trained on")
    test_share: SHARE = option(0.2, "share of the prompts that only the evaluation looks at")
    dtype: Literal["auto", "fp32", "bf16"] = option(
        "auto", "precision of the forward and backward; auto: bf16 where the processor has it, else fp32"
    )
    max_prompt_tokens: POSITIVE = option(512, "longer prompts lose their beginning")
    seed: COUNT = option(8888, "seed of every draw: splits, order, random answers, sampling")
    threads: COUNT = option(0, "processor threads (0: as torch finds them)")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    allow_pickle: bool = option(False, "load weights that a local folder holds as a pickle (.bin, .pt)")

    def trust(self) -> dict[str, bool]:
        """What may be loaded that could carry code, as `load_model` takes it."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


# --------------------------------------------------------------------------------------- unlearn_harm.py
@dataclasses.dataclass
class UnlearnOptions(CommonOptions):
    model_name: str = option("facebook/opt-1.3b", "model to unlearn: a folder or a hub name")
    model_save_dir: str = option("models/unlearned", "folder that the unlearned model is written to")
    log_file: str = option("logs/unlearn.log", "readable log; the same as JSON lines goes to the name with .jsonl")
    from_manifest: str | None = option(None, "repeat the run that a run_manifest.json tells of")
    overwrite: bool = option(False, "replace what --model_save_dir holds")
    dry_run: bool = option(False, "print the plan and the first batch, then stop; nothing is trained or written")
    cache_dir: str = option("data/cache", "folder for the answers that the model gave to rows without a response")

    # ---- what is minimised: --method names a recipe, the others change it
    method: str = option("yao", "recipe: a folder of recipes/ (yao, selective, rmu), or a path to a recipe.yaml")
    set: list[str] = option([], "settings of the recipe, as TERM.SETTING=VALUE or SECTION.SETTING=VALUE")
    forget_loss: str | None = option(
        None, "objective of the term 'forget' (not named: the recipe's): ascent npo simnpo dpo unlikelihood rmu"
    )
    bad_weight: OptionalWeight = option(None, "weight of what pushes forget answers away (not named: the recipe's)")
    random_weight: OptionalWeight = option(
        None,
        "weight of what harmful prompts get instead: other answers, or the end of the turn (not named: the recipe's)",
    )
    normal_weight: OptionalWeight = option(None, "weight of the KL on normal rows (not named: the recipe's)")

    # ---- the run
    max_unlearn_steps: POSITIVE = option(1000, "steps at most")
    max_bad_loss: number(float, 0, above=True) = option(
        100.0, "nats: stop once the forget answers' mean token NLL has reached it"
    )
    batch_size: POSITIVE = option(2, "forget rows a step, over all processes")
    max_answer_tokens: POSITIVE = option(128, "longer answers lose their end")
    lr: number(float, 0, above=True) = option(2e-6, "peak learning rate of AdamW")

    # ---- memory
    use_lora: bool = option(False, "train low-rank adapters; they are merged on save and kept beside the model")
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit keeps AdamW's moments in 8 bits (2 bytes a weight in place of 8; needs bitsandbytes)"
    )
    shard: bool = option(
        False, "split weights, gradients and optimizer state over the processes (FSDP2): for what one GPU cannot hold"
    )  # fmt: skip
    gradient_accumulation: POSITIVE = option(
        1, "parts that a step's rows are gone through in, one after the other: less memory, the same step"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, more time")

    # ---- looking on the way
    eval_every: COUNT = option(0, "steps between evaluations on the development split (0: at start and end only)")
    kl_budget: WEIGHT = option(
        0.0, "nats: restore, at the end, the best evaluated state whose development KL is within it (0: off)"
    )
    save_every: COUNT = option(500, "steps between checkpoints, in a folder beside --model_save_dir (0: none)")
    resume: bool = option(False, "go on from the newest whole checkpoint of this run")

    recipe: dict = dataclasses.field(default_factory=dict, init=False)  # the recipe as it is run, all settings resolved

    def __post_init__(self):
        if self.log_file.endswith(".jsonl"):
            raise UsageError(f"--log_file {self.log_file}: that is where its twin in JSON lines goes; name it .log")
        if self.dev_share + self.test_share > 0.9:
            raise UsageError("--dev_share and --test_share leave less than a tenth to train on: lower one of them")
        if self.kl_budget and not self.eval_every:
            raise UsageError("--kl_budget chooses among the states that are looked at: set --eval_every as well")


# ------------------------------------------------------------------------------ evaluate_unlearning.py
@dataclasses.dataclass
class EvaluateOptions(CommonOptions):
    model_name: str = option("models/unlearned", "the model after unlearning: a folder or a hub name")
    original_name: str = option("facebook/opt-1.3b", "the model before unlearning: a folder or a hub name")
    report_dir: str | None = option(
        None, "folder for report.json, report.html and answers.jsonl (not named: the folder of --model_name)"
    )
    split: Literal["test", "dev", "train", "all"] | None = option(
        None, "which prompts: the split of a run with the same shares and seed (test: never trained on), or all (not "
        "named: test for a model that this suite made, all for others)"
    )  # fmt: skip
    prompts_per_group: POSITIVE = option(64, "prompts a group at most, drawn with the seed")
    generation_batch: POSITIVE = option(64, "prompts answered at once")
    max_new_tokens: POSITIVE = option(48, "tokens of an answer at most (greedy)")
    perplexity_text: str | None = option(None, "text file whose perplexity is compared")
    mc_data: str | None = option(
        None, "multiple-choice file in TruthfulQA's layout (question, mc1_targets, mc2_targets)"
    )
    mc_rows: POSITIVE = option(1000, "rows of --mc_data at most, from the first on")
    mc_template: Literal["chat", "qa", "raw"] = option("qa", "template of the multiple-choice questions")
    judge_model: list[str] = option(
        [], "moderation models, folders or hub names, whose share of flagged answers is given side by side"
    )
    reward_model: str | None = option(
        None, "reward model for the utility of an answer (not named: the original's log-probability of it)"
    )
    retrained_name: str | None = option(
        None, "a model that was never trained on the forget data: what membership shows in it, for the privacy leakage"
    )
    train_log: str | None = option(None, "JSON-lines log of the run, for the curves in the report")
    attacks: list[str] = option(
        ["none"], "all, none, or names: quantise prefill rephrase few_shot sampling relearn probe"
    )
    attack_prompts: POSITIVE = option(32, "forgotten prompts that an attack tries to get back, at most")
    relearn_lr: number(float, 0, above=True) = option(
        1e-4, "learning rate of the relearning attack, of adapters of rank 16 on every layer"
    )
    quick: bool = option(False, "attacks in small: 6 prompts, 4 samples, 8 relearning steps")
    require: list[str] = option(
        [], "requirements such as 'forget.on_topic<=0.05'; exit code 3 where one fails (none named: judged by defaults)"
    )
    reuse: bool = option(False, "print the report that is there, where the same models and options made it")
    examples: COUNT = option(6, "answers printed side by side at the end")


# ---------------------------------------------------------------------------------------------- parsing
class OneLineParser(HfArgumentParser):
    """argparse that says what is wrong in one line, without the usage text, and exits with 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists every option)\n")


def parse(options_class: type, argv: list[str] | None = None):
    """Read the options from a YAML file (`--config`) and the command line; the command line wins.

    The file becomes words of a command line that stand before the real ones, so both pass the same checks, and `1e-5`,
    which YAML takes for text, is read as the number that it is. A run's recipe comes on top: method/recipe.py.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(options_class, allow_abbrev=False)
    words = config_words(options_class, argv) + argv
    if options_class is EvaluateOptions:
        return _parse_evaluation(parser, words)
    return options_class(**vars(parser.parse_args(words)))


def config_words(options_class: type, argv: list[str], also: frozenset[str] = frozenset()) -> list[str]:
    """What the file of `--config` says, as words of a command line; `also`: names that are taken beside the options."""
    path = peek(argv, "config")
    known = {f.name for f in dataclasses.fields(options_class) if f.init} - {"config"} | also
    return _yaml_words(path, known) if path else []


def _parse_evaluation(parser: OneLineParser, words: list[str]) -> EvaluateOptions:
    made = _words_of_run(peek(words, "model_name") or EvaluateOptions.model_name,
                         own_data=peek(words, "forget_data") is not None)  # fmt: skip
    then = EvaluateOptions(**vars(parser.parse_args(made)))
    options = EvaluateOptions(**vars(parser.parse_args(made + words)))
    options.split = options.split or ("test" if made else "all")
    other = [name for name in ("seed", "dev_share", "test_share") if getattr(then, name) != getattr(options, name)]
    if made and other and options.split != "all":
        raise UsageError(f"--{other[0]} {getattr(options, other[0])}: the run that made {options.model_name} split "
                         f"its rows with {getattr(then, other[0])}, and what it trained on would be called unseen; "
                         "leave it out, or pass --split all")  # fmt: skip
    return options


def peek(argv: list[str], name: str, kind=str):
    """One option's value, before the rest is read; None where it is not named, or without a value."""
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", nargs="?", type=kind)
    return getattr(parser.parse_known_args(argv)[0], name)


def _words_of_run(folder: str | None, own_data: bool) -> list[str]:
    """What an evaluation takes over from the run that made the model: its data (the categories with them), splits and
    original."""
    path = Path(folder or "") / "unlearn_args.json"
    if not folder or not path.is_file():
        return []
    try:
        made_with = json.loads(path.read_text(encoding="utf-8"))["options"]
        names = ["forget_data", "normal_data", "harm_categories", "template", "dev_share", "test_share", "seed"]
        if own_data:
            names.remove("harm_categories")
        return words_of({"original_name": made_with["model_name"], **{name: made_with[name] for name in names}})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not what a run writes ({error!r}); restore it or remove it") from error


def words_of(content: dict) -> list[str]:
    """Options and their values as words of a command line."""
    words = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if value is not None and values:
            words += [f"--{key}", *(str(v) for v in values)]
    return words


def read_yaml(path: str | Path, option: str) -> dict:
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
    content = read_yaml(path, "config")
    for key, value in content.items():
        if key not in known:
            raise UsageError(f"--config {path}: unknown option {key!r}")
        if any(isinstance(v, dict | list) for v in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: option {key!r} must be a value or a list of values")
    return words_of(content)
