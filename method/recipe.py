"""A recipe: the terms that a step minimises and their settings, from YAML, options and --set.

Default values of settings are fields of the dataclasses here and in the rooms that use them. A recipe lists what
differs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from pathlib import Path

import yaml
from transformers.hf_argparser import string_to_bool

from engine.adapters import LoraSettings
from engine.optimizer import OptimizerSettings
from method.draw import RunSizes
from method.draws import DRAWS
from method.objectives import OBJECTIVES
from method.sampler import Wording
from method.terms import Term, active_terms
from options import (
    COUNT,
    POSITIVE,
    WEIGHT,
    OneLineParser,
    UnlearnOptions,
    config_words,
    option,
    peek,
    read_settings,
    read_yaml,
    words_of,
)
from utils import UsageError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TERM_KEYS = {"name", "draw", "sequences_of", "loss", "weight", "weight_option", "times", "tokens", "mean_over", "log",
             "watch"}  # fmt: skip
WEIGHTS = ("bad_weight", "random_weight", "normal_weight")


@dataclasses.dataclass(frozen=True)
class OwnAnswers:
    """Generation of the original's answers to rows without a response."""

    temperature: WEIGHT = option(0.7, "sampling temperature (0: greedy)")
    batch_size: POSITIVE = option(64, "prompts per generation batch")


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The weights that are trained."""

    frozen_layers: COUNT = option(
        0, "number of first layers that are frozen, together with the token embeddings and the head"
    )
    parameters: str | None = option(None, "regular expression; only parameters with a matching name are trained")


@dataclasses.dataclass(frozen=True)
class DevSettings:
    """Evaluation during a run, on the dev split."""

    prompts: POSITIVE = option(24, "dev prompts per side")
    tokens: POSITIVE = option(24, "maximum tokens per dev answer")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Layout of a packed batch."""

    pack_tokens: POSITIVE = option(256, "target length of the rows of a packed batch, in tokens")


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of a run."""

    keep: POSITIVE = option(2, "number of newest checkpoints to keep")


SECTIONS = {"wording": Wording, "own_answers": OwnAnswers, "optimizer": OptimizerSettings, "lora": LoraSettings,
            "trainable": Trainable, "dev": DevSettings, "layout": Layout, "checkpoints": Checkpoints}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The terms and settings of a run, all resolved."""

    terms: list[Term]
    wording: Wording
    own_answers: OwnAnswers
    optimizer: OptimizerSettings
    lora: LoraSettings
    trainable: Trainable
    dev: DevSettings
    layout: Layout
    checkpoints: Checkpoints


# ------------------------------------------------------------------------------------------ options and recipe
def parse_run(argv: list[str] | None = None) -> UnlearnOptions:
    """Read a run's options from recipe (`--method`), manifest, YAML file and command line; a later source wins.

    `options.recipe` is the recipe with all settings resolved, as it is saved beside the model.
    """
    argv = sys.argv[1:] if argv is None else argv
    old = old_names()
    arguments, recipe = config_words(UnlearnOptions, argv, frozenset(old)) + argv, None
    if manifest := peek(arguments, "from_manifest"):
        manifest_arguments, recipe = _words_of_manifest(manifest, frozenset(old))
        arguments = manifest_arguments + arguments
    arguments, settings = _take_settings(arguments, old)
    method = peek(arguments, "method") or UnlearnOptions.method
    if recipe is None or peek(argv, "method"):
        recipe = load_recipe(method)
    recipe_options = dict(recipe.get("options") or {})
    if peek(arguments, "use_lora", string_to_bool) is False:
        recipe_options |= recipe.get("whole_weights") or {}
    parser = OneLineParser(UnlearnOptions, allow_abbrev=False)
    options = UnlearnOptions(**vars(parser.parse_args(words_of(recipe_options) + arguments)))
    options.set = [f"{place}={json.dumps(value)}" for place, value in settings]
    unused = [place for place, _ in settings if place.startswith("lora.")]
    if unused and not options.use_lora:
        print(f"{', '.join(unused)}: not used, since adapters are trained with --use_lora only", file=sys.stderr)
    options.recipe = _resolved(recipe, settings, options)
    read_recipe(options)  # refuses unknown settings
    return options


def old_names() -> dict[str, list[str]]:
    """Return {old option: the recipe settings that replace it}."""
    return read_yaml(RECIPES / "old_names.yaml", "recipes")


def load_recipe(method: str) -> dict:
    """Read a recipe by its folder's name or by a path; return the content of its YAML. Raises UsageError."""
    path = RECIPES / method / "recipe.yaml"
    if Path(method).suffix in (".yaml", ".yml"):
        path = Path(method)
    elif not path.is_file():
        names = ", ".join(sorted(file.parent.name for file in RECIPES.glob("*/recipe.yaml")))
        raise UsageError(f"--method {method}: no such recipe; there are {names}, or name a recipe.yaml of your own")
    recipe = read_yaml(path, "method")
    if not isinstance(recipe.get("terms"), list) or not all(isinstance(t, dict) for t in recipe["terms"]):
        raise UsageError(f"--method {method}: a recipe needs a list of terms")
    if unknown := sorted(recipe.keys() - SECTIONS.keys() - {"options", "whole_weights", "terms"}):
        raise UsageError(f"--method {method}: unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    return recipe


def _words_of_manifest(path: str, old: frozenset[str]) -> tuple[list[str], dict | None]:
    """Return (an earlier run's arguments, its resolved recipe or None); output folders are not taken over."""
    known = {f.name for f in dataclasses.fields(UnlearnOptions)} | old
    dropped = {"config", "overwrite", "resume", "model_save_dir", "log_file", "set", "recipe"}
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))["arguments"]
        recipe = arguments.get("recipe")
        if recipe:  # the resolved recipe contains them
            dropped |= {*WEIGHTS, "forget_loss"}
        elif arguments.get("method") == "selective":  # an old manifest, without the term 'stop'
            dropped |= {"num_random_answers", "empty_answer_share"}
        return words_of({k: v for k, v in arguments.items() if k in known - dropped}), recipe
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--from_manifest {path}: is not the run_manifest.json of a run ({error!r})") from error


def _take_settings(argv: list[str], old: dict[str, list[str]]) -> tuple[list[str], list[tuple[str, object]]]:
    """Take all --set and all old options out of the arguments; return (other arguments, [(place, value)]).

    Prints one line for each old option, with its new place.
    """
    parser = OneLineParser(add_help=False, allow_abbrev=False)
    taken: list[tuple[str, list[str]]] = []  # (option, its values)

    class Note(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            taken.append((self.dest, values))

    for name in ("set", *old):
        parser.add_argument(f"--{name}", nargs="+", action=Note, default=argparse.SUPPRESS)
    rest = parser.parse_known_args(argv)[1]
    settings = []
    for name, values in taken:
        if name == "set":
            for text in values:
                place, sign, value = text.partition("=")
                if not sign or "." not in place:
                    raise UsageError(f"--set {text}: must look like stop.weight=2 or optimizer.warmup_steps=20")
                settings.append((place, _value(value)))
        else:
            value = values if name == "lora_targets" else _value(values[0])
            unset = name == "forget_beta" and not float(value)  # 0 stood for the paper's value
            settings += [(place, value) for place in old[name] if not unset]
    for name in dict.fromkeys(name for name, _ in taken if name != "set"):
        print(f"--{name} is now --set {' '.join(f'{place}=...' for place in old[name])}", file=sys.stderr)
    return rest, settings


def _value(text: str):
    """Return the value that a text stands for in YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set: {text!r} is not a value") from error


def _resolved(recipe: dict, settings: list[tuple[str, object]], options: UnlearnOptions) -> dict:
    """Return the recipe with the weights, loss and settings of the command line. Raises UsageError for others."""
    recipe, method = copy.deepcopy(recipe), options.method
    terms = {term.get("name"): term for term in recipe["terms"]}
    for name in WEIGHTS:
        if (value := getattr(options, name)) is not None:
            weighted = [term for term in terms.values() if term.get("weight_option") == name]
            if not weighted:
                raise UsageError(f"--{name}: no term of --method {method} takes its weight from it")
            for term in weighted:
                term["weight"] = value
    if options.forget_loss:
        if "forget" not in terms:
            raise UsageError(f"--forget_loss: --method {method} has no term 'forget'")
        _replace_loss(terms["forget"], options.forget_loss)
    for place, value in settings:
        name, _, key = place.partition(".")
        if name in terms:
            terms[name][key] = value
        elif name in SECTIONS:
            recipe[name] = (recipe.get(name) or {}) | {key: value}
        else:
            raise UsageError(f"--set {place}: --method {method} has no {name!r}; its terms are "
                             f"{', '.join(map(str, terms))}, its sections {', '.join(SECTIONS)}")  # fmt: skip
    return recipe


def _replace_loss(term: dict, loss: str) -> None:
    """Replace the loss of a term, and drop the settings that only the old loss has."""
    before, after = (_setting_names(OBJECTIVES[name]) if name in OBJECTIVES else set() for name in (term["loss"], loss))
    for name in before - after:
        term.pop(name, None)
    term["loss"] = loss


def _setting_names(kind: type) -> set[str]:
    """Return the names of a dataclass's settings."""
    return {field.name for field in dataclasses.fields(kind) if "help" in field.metadata}


# ------------------------------------------------------------------------------------------ recipe -> objects
def read_recipe(options: UnlearnOptions) -> Recipe:
    """Return `options.recipe` as a Recipe. Raises UsageError with term and setting."""
    fixed = {"optimizer": {"lr": options.lr, "total_steps": options.max_unlearn_steps, "kind": options.optimizer,
                           "adapters": options.use_lora}}  # fmt: skip
    sections = {name: read_settings(kind, options.recipe.get(name) or {}, name, **fixed.get(name, {}))
                for name, kind in SECTIONS.items()}  # fmt: skip
    return Recipe(build_terms(options.recipe["terms"], RunSizes(options.batch_size, options.max_answer_tokens)),
                  **sections)  # fmt: skip


def build_terms(specs: list[dict], sizes: RunSizes) -> list[Term]:
    """Return the active terms of a recipe's list of terms. Raises UsageError."""
    terms: dict[str, Term] = {}
    for number, spec in enumerate(specs, 1):
        name = spec.get("name")
        if not isinstance(name, str) or name in terms:
            raise UsageError(f"recipe, term {number}: needs a name of its own, got {name!r}")
        terms[name] = _build_term(name, spec, terms, sizes)
    active = active_terms(list(terms.values()))
    if not any(term.weight for term in active):
        raise UsageError(f"the weights of all terms are 0 ({', '.join(terms)}): set --bad_weight, --random_weight or "
                         "--normal_weight")  # fmt: skip
    for term in active:
        if (other := term.objective.prefers) and other not in {t.name for t in active}:
            raise UsageError(f"{term.name}: {term.loss} prefers the answers of a term {other!r}, and "
                             f"there is none with a weight; there are {', '.join(t.name for t in active)}")  # fmt: skip
    return active


def _build_term(name: str, spec: dict, earlier: dict[str, Term], sizes: RunSizes) -> Term:
    """Return a term from its entry in a recipe; `earlier`: the terms before it, by name. Raises UsageError."""
    loss, draw = spec.get("loss"), spec.get("draw")
    if loss not in OBJECTIVES:
        raise UsageError(f"{name}: loss must be one of {', '.join(OBJECTIVES)}, got {loss!r}")
    settings = spec.keys() - TERM_KEYS  # of its draw and of its objective
    if shared := spec.get("sequences_of"):
        if shared not in earlier or draw:
            raise UsageError(f"{name}: sequences_of must name a term that stands before it, and excludes a draw")
        own_draw, of_draw = earlier[shared].draw, set()
    else:
        if draw not in DRAWS:
            raise UsageError(f"{name}: draw must be one of {', '.join(DRAWS)}, got {draw!r}")
        of_draw = settings & _setting_names(DRAWS[draw])
        own_draw = read_settings(DRAWS[draw], {key: spec[key] for key in of_draw}, name, name=name, sizes=sizes)
    if unknown := sorted(settings - of_draw - _setting_names(OBJECTIVES[loss])):
        known = sorted(_setting_names(OBJECTIVES[loss]) | (_setting_names(DRAWS[draw]) if draw else set()))
        raise UsageError(f"{name}: has no setting {unknown[0]!r}; it has weight, {', '.join(known)}")
    objective = read_settings(OBJECTIVES[loss], {key: spec[key] for key in settings - of_draw}, name)
    weight = read_settings(_Weight, {"weight": spec.get("weight", 1.0)}, name).weight
    if times := spec.get("times"):
        if times not in earlier:
            raise UsageError(f"{name}: times must name a term that stands before it, got {times!r}")
        weight = earlier[times].weight * weight
    for key, allowed in (("tokens", ("all", "first")), ("mean_over", ("tokens", "sequences"))):
        if spec.get(key, allowed[0]) not in allowed:
            raise UsageError(f"{name}.{key}: must be {' or '.join(allowed)}, got {spec[key]!r}")
    return Term(name, own_draw, loss, objective, weight, spec.get("tokens", "all"),
                spec.get("mean_over", objective.over),
                spec.get("log") or f"{name}_{objective.measure}", bool(spec.get("watch")))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Weight:
    """The weight of a term, as a setting."""

    weight: WEIGHT = option(1.0, "weight of the term in the sum")
