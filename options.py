"""Every option, its one default, its unit and its check; how a YAML file and the command line meet.

An option is a dataclass field. Its annotation is either a plain type or a check made by `number`,
so that a bad value is refused while the command line is read, with exit code 2 and one line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Literal

import yaml
from transformers.hf_argparser import HfArgumentParser, string_to_bool

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


def option(default, text: str):
    """A field with its help text; a list default is copied for each instance."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": text})
    return dataclasses.field(default=default, metadata={"help": text})


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
    generation_batch: POSITIVE = option(64, "prompts answered at once")
    seed: COUNT = option(8888, "seed of every draw: splits, order, random answers, sampling")
    threads: COUNT = option(0, "processor threads (0: as torch finds them)")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    allow_pickle: bool = option(False, "load weights that a local folder holds as a pickle (.bin, .pt)")

    def trust(self) -> dict[str, bool]:
        """What may be loaded that could carry code, as `load_model` takes it."""
        return {"trust_remote_code": self.trust_remote_code, "allow_pickle": self.allow_pickle}


# What `--method` gives. yao is the defaults themselves. selective holds and empties the first words of many answers,
# begun for the model on both sides, puts requests in other words and templates, and bounds the forgetting, in adapters;
# docs/LOG.md tells how it was found, on a model of 135M parameters; on none that is larger.
WHOLE_WEIGHTS = 0.1  # of a recipe's rate for adapters is what whole weights take
RECIPES = {
    "selective": {
        "max_unlearn_steps": 260,
        "use_lora": True,
        "lora_rank": 64,
        "lora_alpha": 128,
        "lr": 1e-3,
        "bad_weight": 0.3,
        "forget_ceiling": 6,
        "random_weight": 2.0,
        "normal_weight": 28.0,
        "first_token_weight": 0.43,
        "first_token_rows": 15,
        "empty_answer_rows": 9,
        "begun_answer_tokens": 5,
        "empty_answer_share": 1.0,
        "num_random_answers": 1,
        "batch_size": 1,
        "normal_batch_size": 4,
        "normal_answer_tokens": 24,
        "max_answer_tokens": 32,
        "other_template_share": 0.45,
        "rephrase_share": 0.5,
        "earlier_turn_share": 0.06,
        "warmup_steps": 20,
    }
}


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

    # ---- the objective
    method: Literal["yao", "selective"] = option(
        "yao", "recipe that gives the options that are not named: yao, the published terms and weights; selective, "
        "tuned to forget without dragging harmless prompts along (RECIPES in options.py)"
    )  # fmt: skip
    forget_loss: Literal["ascent", "npo", "simnpo", "dpo", "unlikelihood"] = option(
        "ascent", "how harmful answers are pushed away (losses.py); dpo prefers the row's random answers to them"
    )
    forget_beta: WEIGHT = option(0.0, "beta of npo, simnpo and dpo (0: as in their papers: 0.1, 2.5, 0.1)")
    bad_weight: WEIGHT = option(0.5, "weight of --forget_loss on the harmful answers")
    random_weight: WEIGHT = option(1.0, "weight of the NLL of random normal answers after the harmful prompts")
    normal_weight: WEIGHT = option(1.0, "weight of the KL to the original on normal rows")
    num_random_answers: COUNT = option(5, "random answers after each harmful prompt (K)")
    forget_ceiling: WEIGHT = option(
        0.0, "nats: a harmful row whose mean NLL is above it is pushed no further (0: no ceiling)"
    )
    first_token_weight: WEIGHT = option(
        0.0, "extra weight, inside the normal term, of the KL on the first answer token alone (mean over rows)"
    )
    empty_answer_share: number(float, 0, 1) = option(
        0.0, "share of the random answers that are empty: the end-of-turn token at once"
    )
    other_template_share: SHARE = option(
        0.0, "share of all rows put to the model in another template than --template, drawn anew each visit"
    )
    rephrase_share: number(float, 0, 1) = option(
        0.0, "share of all rows whose prompt is put in other words (a command as a question, ...), anew each visit"
    )
    earlier_turn_share: SHARE = option(
        0.0, "share of all rows that stand as the second turn of a talk, after the prompt of any other row and the "
        "beginning of its answer, drawn anew each visit"
    )  # fmt: skip

    answer_temperature: WEIGHT = option(
        0.7, "sampling temperature of the model's own answers to rows without a response (0: greedy)"
    )

    # ---- the run
    max_unlearn_steps: POSITIVE = option(1000, "steps at most")
    max_bad_loss: number(float, 0, above=True) = option(
        100.0, "nats: stop once the harmful rows' mean token NLL has reached it"
    )
    batch_size: POSITIVE = option(2, "harmful rows a step, over all processes")
    normal_batch_size: COUNT = option(0, "normal rows a step, over all processes (0: as many as --batch_size)")
    empty_answer_rows: COUNT = option(
        0, "further harmful rows a step, with the empty answer alone as their random answer; they cost a prompt each"
    )
    begun_answer_tokens: COUNT = option(
        0, "tokens of an answer put after the further rows' prompts, of both sides: in a harmful row each is to be "
        "followed by the end of the turn, so that an answer that is begun for the model is not gone on with (0: off)"
    )  # fmt: skip
    first_token_rows: COUNT = option(
        0, "further normal rows a step that hold the model at the first answer token alone; they cost a prompt each"
    )
    max_answer_tokens: POSITIVE = option(128, "longer answers lose their end")
    normal_answer_tokens: COUNT = option(0, "the same for normal rows alone (0: as --max_answer_tokens)")
    pack_tokens: POSITIVE = option(256, "length that the rows of a packed batch are filled to")
    lr: number(float, 0, above=True) = option(2e-6, "peak learning rate of AdamW")
    lr_schedule: Literal["linear", "constant"] = option("linear", "after the warm-up: down to zero, or level")
    warmup_steps: COUNT = option(0, "steps over which the learning rate rises")
    weight_decay: WEIGHT = option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: number(float, 0, above=True) = option(1.0, "gradients are clipped to this global norm")

    frozen_layers: COUNT = option(
        0, "layers, from the first on, that stay as they are, and with them the token embeddings and the head"
    )

    # ---- memory
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "adamw8bit keeps AdamW's moments in 8 bits (2 bytes a weight in place of 8; needs bitsandbytes)"
    )
    use_lora: bool = option(False, "train low-rank adapters; they are merged on save and kept beside the model")
    lora_rank: POSITIVE = option(16, "rank of the adapters")
    lora_alpha: POSITIVE = option(32, "scale of the adapters, as alpha / rank")
    lora_targets: list[str] = option(["all-linear"], "names of the layers that get adapters")
    shard: bool = option(
        False, "split weights, gradients and optimizer state over the processes (FSDP2): for what one GPU cannot hold"
    )  # fmt: skip
    gradient_accumulation: POSITIVE = option(
        1, "parts that a step's rows are gone through in, one after the other: less memory, the same step"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward: less memory, more time")

    # ---- looking on the way
    eval_every: COUNT = option(0, "steps between evaluations on the development split (0: at start and end only)")
    eval_prompts: POSITIVE = option(24, "development prompts a side in an evaluation on the way")
    eval_tokens: POSITIVE = option(24, "tokens of an answer in an evaluation on the way")
    kl_budget: WEIGHT = option(
        0.0, "nats: restore, at the end, the best evaluated state whose development KL is within it (0: off)"
    )
    save_every: COUNT = option(500, "steps between checkpoints, in a folder beside --model_save_dir (0: none)")
    keep_checkpoints: POSITIVE = option(2, "newest checkpoints that stay")
    resume: bool = option(False, "go on from the newest whole checkpoint of this run")

    def __post_init__(self):
        if self.log_file.endswith(".jsonl"):
            raise UsageError(f"--log_file {self.log_file}: that is where its twin in JSON lines goes; name it .log")
        if self.dev_share + self.test_share > 0.9:
            raise UsageError("--dev_share and --test_share leave less than a tenth to train on: lower one of them")
        if self.forget_loss == "dpo" and self.random_weight * self.num_random_answers == 0:
            raise UsageError("--forget_loss dpo prefers random answers: it needs --random_weight and "
                             "--num_random_answers above 0")  # fmt: skip
        if self.forget_ceiling and self.forget_loss != "ascent":
            raise UsageError(f"--forget_ceiling is for --forget_loss ascent; {self.forget_loss} is bounded by itself")
        if self.kl_budget and not self.eval_every:
            raise UsageError("--kl_budget chooses among the states that are looked at: set --eval_every as well")
        if self.random_weight > 0 and self.num_random_answers == 0:
            raise UsageError("--num_random_answers 0 needs --random_weight 0: there is no answer to train on")
        if self.bad_weight + self.random_weight + self.normal_weight == 0:
            raise UsageError("all three weights are 0: set --bad_weight, --random_weight or --normal_weight")

    def beta(self) -> tuple[float, ...]:
        """--forget_beta as a loss takes it: nothing where the loss's own default holds."""
        return (self.forget_beta,) if self.forget_beta else ()


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

    The file becomes words of a command line that stand before the real ones, so both pass the
    same checks, and `1e-5`, which YAML takes for text, is read as the number that it is.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = OneLineParser(options_class, allow_abbrev=False)
    known = {f.name for f in dataclasses.fields(options_class)}
    path = _peek(argv, "config")
    words = _yaml_words(path, known) if path else []
    if options_class is UnlearnOptions and (manifest := _peek(words + argv, "from_manifest")):
        words = _words_of_manifest(manifest, known) + words
    if options_class is UnlearnOptions:
        recipe = dict(RECIPES.get(_peek(words + argv, "method"), {}))
        if _peek(words + argv, "forget_loss") not in (None, "ascent"):
            recipe.pop("forget_ceiling", None)  # the others are bounded by themselves
        if recipe and _peek(words + argv, "use_lora", string_to_bool) is False:
            recipe["lr"] *= WHOLE_WEIGHTS
        words = _words(recipe) + words
    if options_class is EvaluateOptions:
        made = _words_of_run(_peek(words + argv, "model_name") or EvaluateOptions.model_name,
                             own_data=_peek(words + argv, "forget_data") is not None)  # fmt: skip
        then = options_class(**vars(parser.parse_args(made)))
        options = options_class(**vars(parser.parse_args(made + words + argv)))
        options.split = options.split or ("test" if made else "all")
        other = [name for name in ("seed", "dev_share", "test_share") if getattr(then, name) != getattr(options, name)]
        if made and other and options.split != "all":
            raise UsageError(f"--{other[0]} {getattr(options, other[0])}: the run that made {options.model_name} split "
                             f"its rows with {getattr(then, other[0])}, and what it trained on would be called unseen; "
                             "leave it out, or pass --split all")  # fmt: skip
        return options
    return options_class(**vars(parser.parse_args(words + argv)))


def _peek(argv: list[str], name: str, kind=str):
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
        return _words({"original_name": made_with["model_name"], **{name: made_with[name] for name in names}})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: is not what a run writes ({error!r}); restore it or remove it") from error


def _words_of_manifest(path: str, known: set[str]) -> list[str]:
    """The arguments of an earlier run; the folders that it wrote to are not taken over."""
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))["arguments"]
        own = ("config", "overwrite", "resume", "model_save_dir", "log_file")
        return _words({k: v for k, v in arguments.items() if k in known and k not in own})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--from_manifest {path}: is not the run_manifest.json of a run ({error!r})") from error


def _words(content: dict) -> list[str]:
    """Options and their values as words of a command line."""
    words = []
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if value is not None and values:
            words += [f"--{key}", *(str(v) for v in values)]
    return words


def _yaml_words(path: str, known: set[str]) -> list[str]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--config {path}: must hold one 'option: value' a line")
    for key, value in content.items():
        if key not in known or key == "config":
            raise UsageError(f"--config {path}: unknown option {key!r}")
        if any(isinstance(v, dict | list) for v in (value if isinstance(value, list) else [value])):
            raise UsageError(f"--config {path}: option {key!r} must be a value or a list of values")
    return _words(content)
