"""Write configs/schema/: JSON schemas of --config files and recipes for editors, from the dataclasses that hold them.

python docs/make_schemas.py
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.options import EvaluateOptions
from method.draws import DRAWS
from method.objectives import OBJECTIVES
from method.recipe import SECTIONS, TermEntry, setting_names
from options import UnlearnOptions, in_groups
from run.finetuning import FinetuneOptions
from run.parsing import NOT_OF_A_RECIPE, old_names

FOLDER = ROOT / "configs" / "schema"
CONFIGS = {"unlearn_harm": UnlearnOptions, "finetune": FinetuneOptions, "evaluate_unlearning": EvaluateOptions}
DRAFT = "http://json-schema.org/draft-07/schema#"
POWER = r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"  # 1e-5 is text to some readers of YAML, and a number to others


# ------------------------------------------------------------------------------------------------ a value
def value_schema(hint) -> dict:
    """Return the JSON schema of what a field with this annotation takes from YAML."""
    if checked := getattr(hint, "schema", None):
        return {"anyOf": [_as_yaml(part) for part in checked["anyOf"]]} if "anyOf" in checked else _as_yaml(checked)
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) in (list, tuple):  # one value stands for a list of it
        plain = ["string", "number", "boolean"]
        return {"type": [*plain, "array"], "items": {"type": plain}}
    if get_origin(hint) in (Union, types.UnionType):
        inner = value_schema(next(part for part in get_args(hint) if part is not type(None)))
        if "enum" in inner:
            return {"enum": [*inner["enum"], None]}
        kinds = inner["type"] if isinstance(inner["type"], list) else [inner["type"]]
        return inner | {"type": [*kinds, "null"]}
    return _as_yaml({"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[hint]})


def _as_yaml(schema: dict) -> dict:
    return schema | {"type": ["number", "string"], "pattern": POWER} if schema.get("type") == "number" else dict(schema)


def properties(kind: type, fields: list[dataclasses.Field] | None = None) -> dict[str, dict]:
    """Return the schema of each setting of a dataclass, with its text and its default."""
    hints, found = get_type_hints(kind), {}
    for field in fields or [field for field in dataclasses.fields(kind) if "help" in field.metadata]:
        found[field.name] = value_schema(hints[field.name]) | {"description": field.metadata["help"].replace("%%", "%")}
        if field.default not in (None, dataclasses.MISSING):
            default = field.default
            found[field.name]["default"] = list(default) if isinstance(default, tuple) else default
    return found


# ------------------------------------------------------------------------------------------------- a file
def config_schema(script: str, kind: type) -> dict:
    """Return the schema of a script's --config file. Old option names are marked as such."""
    fields = [field for fields in in_groups(kind).values() for field in fields if field.name != "config"]
    known = properties(kind, fields)
    if kind is UnlearnOptions:
        known |= {name: {"deprecated": True, "description": f"now --set {' '.join(f'{place}=...' for place in places)}"}
                  for name, places in old_names().items()}  # fmt: skip
    return {"$schema": DRAFT, "title": f"--config of {script}.py", "type": "object", "additionalProperties": False,
            "properties": known}  # fmt: skip


def recipe_schema() -> dict:
    """Return the schema of a recipe.yaml."""
    given = {name: known for name, known in properties(UnlearnOptions).items() if name not in NOT_OF_A_RECIPE}
    sections = {name: _section(properties(kind), _first_line(kind)) for name, kind in SECTIONS.items()}
    sections["options"] = _section(given, "defaults of options; the command line overrides them")
    sections["whole_weights"] = _section(given, "defaults of options in a run without adapters")
    terms = {"type": "array", "minItems": 1, "items": term_schema(), "description": "what a step minimises"}
    return {"$schema": DRAFT, "title": "recipe.yaml", "type": "object", "additionalProperties": False,
            "required": ["terms"], "properties": sections | {"terms": terms}}  # fmt: skip


def term_schema() -> dict:
    """Return the schema of a term: its own settings, and those of its draw and of its objective."""
    own = properties(TermEntry)
    own["loss"] |= {"enum": list(OBJECTIVES)}
    own["draw"] |= {"enum": [*DRAWS, None]}
    of_draws, of_losses = _names(DRAWS), _names(OBJECTIVES)
    cases = [_case("draw", name, properties(kind), of_draws - of_losses) for name, kind in DRAWS.items()]
    cases += [_case("loss", name, properties(kind), of_losses - of_draws) for name, kind in OBJECTIVES.items()]
    cases.append({"if": {"required": ["sequences_of"]},
                  "then": {"propertyNames": {"not": {"enum": ["draw", *sorted(of_draws - of_losses)]}}}})  # fmt: skip
    return {"type": "object", "required": ["name", "loss"], "additionalProperties": False,
            "properties": {name: {} for name in sorted(of_draws | of_losses)} | own, "allOf": cases}  # fmt: skip


def _case(key: str, name: str, known: dict[str, dict], all_of_key: set[str]) -> dict:
    """Return what holds for a term with this draw or loss; no setting of another one alone may stand in it."""
    then = {"properties": known} if known else {}
    if foreign := sorted(all_of_key - known.keys()):
        then["propertyNames"] = {"not": {"enum": foreign}}
    return {"if": {"properties": {key: {"const": name}}, "required": [key]}, "then": then}


def _names(registry: dict[str, type]) -> set[str]:
    return {name for kind in registry.values() for name in setting_names(kind)}


def _section(known: dict[str, dict], text: str) -> dict:
    return {"type": ["object", "null"], "additionalProperties": False, "description": text, "properties": known}


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def schemas() -> dict[str, str]:
    """Return {name of a file in configs/schema/: its text}."""
    made = {script: config_schema(script, kind) for script, kind in CONFIGS.items()} | {"recipe": recipe_schema()}
    return {f"{name}.json": _text(schema) + "\n" for name, schema in made.items()}


def _text(value, indent: str = "") -> str:
    """Return JSON with a line for each setting."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(part, dict) and part for part in inner):
        return json.dumps(value, ensure_ascii=False)
    deeper = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + _text(part, deeper) for part in value) + f"\n{indent}]"
    lines = [f"{deeper}{json.dumps(key)}: {_text(part, deeper)}" for key, part in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in schemas().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"{FOLDER / name}: {len(text.splitlines())} lines")
