"""How a run's options come together: recipe (`--method`), manifest, YAML file, command line; a later source wins.

Old option names that have become settings of a recipe are read here, wherever they stand.
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

from command_line import OneLineParser, config_words, peek, read_yaml, underscored, words_of
from method.draws import DRAWS
from method.objectives import OBJECTIVES
from method.recipe import FORGET_LOSSES, SECTIONS, WEIGHTS, TermEntry, read_recipe, setting_names, with_defaults
from options import UnlearnOptions
from utils import UsageError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# what a recipe may not give: where the recipe comes from, and where a run writes
NOT_OF_A_RECIPE = {
    "config",
    "set",
    "method",
    "forget_loss",
    *WEIGHTS,
    "from_manifest",
    "model_save_dir",
    "log_file",
    "report_to",
}
ZERO_MEANT_NONE = {"forget_beta", "forget_ceiling"}  # old options whose 0 left the setting as it was

Settings = list[tuple[str, object]]  # (TERM.SETTING or SECTION.SETTING, value)


@dataclasses.dataclass
class EarlierRun:
    """What a run_manifest.json gives: options as words, and the recipe as it was run. Manifests older than recipe files
    have none; `settings`, `weights` and `forget_loss` are then set."""

    words: list[str] = dataclasses.field(default_factory=list)
    method: str | None = None
    recipe: dict | None = None
    settings: Settings = dataclasses.field(default_factory=list)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    forget_loss: str | None = None


def parse_run(argv: list[str] | None = None) -> UnlearnOptions:
    """Read a run's options. `options.recipe` is the recipe with every setting, as it is saved beside the model.

    Raises UsageError; wrong words of the command line exit with 2 and one line.
    """
    argv = underscored(sys.argv[1:] if argv is None else argv)
    old = old_names()
    typed = config_words(UnlearnOptions, argv, frozenset(old)) + argv
    manifest = peek(typed, "from_manifest")
    earlier = read_earlier_run(manifest, old) if manifest else EarlierRun()
    typed, settings = _take_settings(typed, old)
    method = peek(earlier.words + typed, "method") or UnlearnOptions.method
    recipe = earlier.recipe if earlier.recipe and method == earlier.method else load_recipe(method)
    recipe_options = dict(recipe.get("options") or {})
    words = words_of(recipe_options) + earlier.words + typed
    if not peek(words, "use_lora", string_to_bool, const=True):
        recipe_options |= recipe.get("whole_weights") or {}
    parser = OneLineParser(UnlearnOptions)
    options = UnlearnOptions(**vars(parser.parse_args(words_of(recipe_options) + earlier.words + typed)))
    options.set = [f"{place}={json.dumps(value, default=str)}" for place, value in settings]
    unused = [place for place, _ in settings if place.startswith("lora.")]
    if unused and not options.use_lora:
        print(f"{', '.join(unused)}: not used, since adapters are trained with --use_lora only", file=sys.stderr)
    if method == earlier.method:
        recipe = _with_earlier(recipe, earlier, options)
    options.recipe = with_defaults(_with_typed(recipe, settings, options), options)
    read_recipe(options)  # refuses what no run can be made of
    return options


def old_names() -> dict[str, list[str]]:
    """Return {old option: the recipe settings that replace it}."""
    return read_yaml(RECIPES / "old_names.yaml", "recipes")


# ------------------------------------------------------------------------------------------------ what is read
def load_recipe(method: str) -> dict:
    """Read a recipe by its folder's name or by a path; return the content of its YAML. Raises UsageError."""
    path = RECIPES / method / "recipe.yaml"
    if Path(method).suffix in (".yaml", ".yml"):
        path = Path(method)
    elif not path.is_file():
        names = ", ".join(sorted(file.parent.name for file in RECIPES.glob("*/recipe.yaml")))
        raise UsageError(f"--method {method}: no such recipe; there are {names}, or name a recipe.yaml of your own")
    recipe = read_yaml(path, "method")
    _check_recipe(recipe, f"--method {method}")
    return recipe


def _check_recipe(recipe, where: str) -> None:
    """Raise UsageError if a recipe is not a mapping of sections, the options that it gives, and a list of terms."""
    if not isinstance(recipe, dict):
        raise UsageError(f"{where}: a recipe needs a list of terms")
    known = {field.name for field in dataclasses.fields(UnlearnOptions) if field.init} - NOT_OF_A_RECIPE
    for name, section in recipe.items():
        if name not in (*SECTIONS, "options", "whole_weights", "terms"):
            raise UsageError(f"{where}: unknown section {name!r}; there are {', '.join(SECTIONS)}")
        if name != "terms" and not isinstance(section, dict | None):
            raise UsageError(f"{where}: {name} must hold one 'name: value' a line")
        if name in ("options", "whole_weights") and (wrong := [key for key in section or {} if key not in known]):
            raise UsageError(f"{where}: {name} holds {wrong[0]!r}, which is no option that a recipe gives")
    terms = recipe.get("terms")
    if not isinstance(terms, list) or not all(isinstance(term, dict) for term in terms) or not terms:
        raise UsageError(f"{where}: a recipe needs a list of terms")


def read_earlier_run(path: str, old: dict[str, list[str]]) -> EarlierRun:
    """Read a run_manifest.json. Folders that the run wrote to are not taken over. Raises UsageError."""
    known = {field.name for field in dataclasses.fields(UnlearnOptions) if field.init}
    dropped = {"config", "overwrite", "resume", "model_save_dir", "log_file", "set", "forget_loss", *WEIGHTS,
               "report_to", "make_neighbours"}  # their file is among normal_data  # fmt: skip
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))["arguments"]
        earlier = EarlierRun(words_of({k: v for k, v in arguments.items() if k in known - dropped}),
                             arguments.get("method", UnlearnOptions.method), arguments.get("recipe"))  # fmt: skip
        if earlier.recipe is not None:
            _check_recipe(earlier.recipe, f"--from_manifest {path}")
            return earlier
        earlier.weights = {name: arguments[name] for name in WEIGHTS if arguments.get(name) is not None}
        earlier.forget_loss = arguments.get("forget_loss")
        moved = {name: value for name, value in arguments.items() if name in old}
        earlier.settings = [(place, value) for name, value in moved.items() for place in old[name]
                            if not (name in ZERO_MEANT_NONE and not value)]  # fmt: skip
        if moved:
            print(f"--from_manifest {path}: {len(moved)} of its options are settings of a recipe now "
                  "(recipes/old_names.yaml)", file=sys.stderr)  # fmt: skip
        return earlier
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"--from_manifest {path}: is not the run_manifest.json of a run ({error!r})") from error


def _take_settings(argv: list[str], old: dict[str, list[str]]) -> tuple[list[str], Settings]:
    """Take all --set and all old options out of the arguments; return (other arguments, settings).

    Prints one line for each old option, with its new place.
    """
    parser = OneLineParser(add_help=False)
    taken: list[tuple[str, list[str] | str]] = []  # (option, its values)

    class Note(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):
            taken.append((self.dest, values))

    for name in ("set", *old):
        several = {"nargs": "+"} if name in ("set", "lora_targets") else {}
        parser.add_argument(f"--{name}", action=Note, default=argparse.SUPPRESS, **several)
    rest = parser.parse_known_args(argv)[1]
    settings: Settings = []
    for name, values in taken:
        if name == "set":
            for text in values:
                place, sign, value = text.partition("=")
                if not sign or "." not in place:
                    raise UsageError(f"--set {text}: must look like stop.weight=2 or optimizer.warmup_steps=20")
                settings.append((place, _value(value)))
        else:
            value = values if name == "lora_targets" else _value(values)
            if not (name in ZERO_MEANT_NONE and value in (0, 0.0)):
                settings += [(place, value) for place in old[name]]
    for name in dict.fromkeys(name for name, _ in taken if name != "set"):
        print(f"--{name} is now --set {' '.join(f'{place}=...' for place in old[name])}", file=sys.stderr)
    return rest, settings


def _value(text: str):
    """Return the value that a text stands for in YAML."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"--set: {text!r} is not a value") from error


# --------------------------------------------------------------------------------------------- put in its place
def _with_earlier(recipe: dict, earlier: EarlierRun, options: UnlearnOptions) -> dict:
    """Return the recipe with what a manifest of a time before recipes were files says, as far as it has the place."""
    recipe = copy.deepcopy(recipe)
    terms = _by_name(recipe)
    for name, weight in earlier.weights.items():
        for term in terms.values():
            if term.get("weight_option") == name:
                term["weight"] = weight
    if earlier.forget_loss in FORGET_LOSSES and "forget" in terms:
        _replace_loss(terms["forget"], options.forget_loss or earlier.forget_loss)
    for place, value in earlier.settings:
        name, _, key = place.partition(".")
        if name in SECTIONS and key in setting_names(SECTIONS[name]):
            recipe[name] = (recipe.get(name) or {}) | {key: value}
        elif name in terms and key in _known_settings(terms[name]):
            terms[name][key] = value
    return recipe


def _with_typed(recipe: dict, settings: Settings, options: UnlearnOptions) -> dict:
    """Return the recipe with the weights, loss and settings that were typed. Raises UsageError for others."""
    recipe, method = copy.deepcopy(recipe), options.method
    terms = _by_name(recipe)
    for name in WEIGHTS:
        if (value := getattr(options, name)) is not None:
            weighted = [term for term in terms.values() if term.get("weight_option") == name]
            if not weighted:
                raise UsageError(f"--{name}: no term of --method {method} takes its weight from it")
            for term in weighted:
                term["weight"] = value
    if options.forget_loss:
        if options.forget_loss not in FORGET_LOSSES:
            raise UsageError(f"--forget_loss {options.forget_loss}: must be one of {', '.join(FORGET_LOSSES)}")
        if "forget" not in terms:
            raise UsageError(f"--forget_loss: --method {method} has no term 'forget'")
        _replace_loss(terms["forget"], options.forget_loss)
    for place, value in settings:
        name, _, key = place.partition(".")
        if name in terms and key == "loss" and _is_key(value, OBJECTIVES):
            _replace_loss(terms[name], value)
        elif name in terms and key != "name":
            terms[name][key] = value
        elif name in SECTIONS:
            recipe[name] = (recipe.get(name) or {}) | {key: value}
        else:
            raise UsageError(f"--set {place}: --method {method} has no {name!r}; its terms are "
                             f"{', '.join(terms)}, its sections {', '.join(SECTIONS)}")  # fmt: skip
    return recipe


def _by_name(recipe: dict) -> dict[str, dict]:
    return {term["name"]: term for term in recipe["terms"] if isinstance(term.get("name"), str)}


def _replace_loss(term: dict, loss: str) -> None:
    """Replace the loss of a term, and drop the settings that only the old loss has."""
    before = term.get("loss")
    if before != loss and _is_key(before, OBJECTIVES):
        for name in setting_names(OBJECTIVES[before]):  # a beta of one loss is not that of another
            term.pop(name, None)
    term["loss"] = loss


def _known_settings(term: dict) -> set[str]:
    """Return the names that an entry of a recipe may hold."""
    draw, loss = term.get("draw"), term.get("loss")
    return {*setting_names(TermEntry), *(setting_names(DRAWS[draw]) if _is_key(draw, DRAWS) else ()),
            *(setting_names(OBJECTIVES[loss]) if _is_key(loss, OBJECTIVES) else ())}  # fmt: skip


def _is_key(name, registry: dict) -> bool:
    return isinstance(name, str) and name in registry
