"""The schemas that an editor reads: those of the code, true of every file that comes along, as strict as the parser."""

import json
import re

import pytest
import yaml
from conftest import ROOT, docs_script

from command_line import parse
from evaluation.parsing import parse_evaluation
from run.finetuning import FinetuneOptions
from run.parsing import parse_run
from utils import UsageError

FOLDER = ROOT / "configs/schema"
FILES = {
    "unlearn_harm": ["configs/demo.yaml", "configs/opt-1.3b.yaml", "configs/chat-7b-lora.yaml",
                     "recipes/people/planted.yaml", "recipes/facts/planted.yaml", "recipes/copyright/planted.yaml"],
    "finetune": ["configs/planted.yaml", "configs/planted_twin.yaml"],
    "evaluate_unlearning": ["configs/planted_check.yaml", "recipes/people/evaluate.yaml", "recipes/facts/evaluate.yaml",
                            "recipes/copyright/evaluate.yaml"],
    "recipe": sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("recipes/*/recipe.yaml")),
}  # fmt: skip
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float),
         "null": type(None)}  # fmt: skip
SELECTED = {"name": "forget", "draw": "answer", "loss": "npo"}  # a term that is whole


def faults(schema: dict, value, where: str = "") -> list[str]:
    """Where a value breaks a schema, by the words of JSON schema that ours use (their meaning: json-schema.org)."""
    kinds = schema.get("type", list(TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    fits = [kind for kind in kinds
            if isinstance(value, TYPES[kind]) and (kind in ("boolean",) or not isinstance(value, bool))]  # fmt: skip
    found = [] if fits else [f"{where}: type"]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    broken = {
        "enum": "enum" in schema and value not in schema["enum"],
        "const": "const" in schema and value != schema["const"],
        "minimum": is_number and value < schema.get("minimum", value),
        "exclusiveMinimum": is_number and "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"],
        "maximum": is_number and value > schema.get("maximum", value),
        "pattern": isinstance(value, str) and not re.search(schema.get("pattern", ""), value),
        "minItems": isinstance(value, list) and len(value) < schema.get("minItems", 0),
        "not": "not" in schema and not faults(schema["not"], value),
        "anyOf": "anyOf" in schema and all(faults(part, value) for part in schema["anyOf"]),
    }
    found += [f"{where}: {word}" for word, is_broken in broken.items() if is_broken]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        found += [f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value]
        for name, inner in value.items():
            found += faults(known[name], inner, f"{where}.{name}") if name in known else []
            found += [] if name in known or schema.get("additionalProperties", True) else [f"{where}.{name}: unknown"]
            found += faults(schema.get("propertyNames", {}), name, f"{where}.{name}")
    for item in value if isinstance(value, list) else ():
        found += faults(schema.get("items", {}), item, f"{where}[]")
    if "if" in schema and not faults(schema["if"], value):
        found += faults(schema.get("then", {}), value, where)
    for part in schema.get("allOf", ()):
        found += faults(part, value, where)
    return found


def schema_of(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_the_schemas_are_those_of_the_code():
    found = {file.name: file.read_text() for file in FOLDER.glob("*.json")}
    assert found == docs_script("make_schemas").schemas(), "run python docs/make_schemas.py"


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
def test_a_schema_holds_for_the_files_that_come_along(name, file):
    assert faults(schema_of(name), yaml.safe_load((ROOT / file).read_text())) == []


def is_refused(parser, words) -> bool:
    try:
        parser(words)
    except (UsageError, SystemExit):
        return True
    return False


PARSERS = {"unlearn_harm": parse_run, "evaluate_unlearning": parse_evaluation,
           "finetune": lambda argv: parse(FinetuneOptions, argv)}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "wrong"), [
    ("unlearn_harm", "lr: 1e-5", False),  # text, to this reader of YAML
    ("unlearn_harm", "lr: 0", True),
    ("unlearn_harm", "lr: fast", True),
    ("unlearn_harm", "learning_rate: 1.0e-5", True),
    ("unlearn_harm", "template: haiku", True),
    ("unlearn_harm", "max_unlearn_steps: 2.5", True),
    ("unlearn_harm", "dev_share: 0.95", True),
    ("unlearn_harm", "use_lora: perhaps", True),
    ("unlearn_harm", "use_lora: true", False),
    ("unlearn_harm", "forget_data: rows.jsonl", False),
    ("unlearn_harm", "forget_data: [a.jsonl, b.jsonl]", False),
    ("unlearn_harm", "forget_data: {a: 1}", True),
    ("unlearn_harm", "bad_weight:", False),
    ("unlearn_harm", "begun_answer_tokens: 0", False),  # an old name of a setting
    ("finetune", "{data: rows.jsonl, epochs: 2.5}", False),
    ("finetune", "{data: rows.jsonl, forget_data: rows.jsonl}", True),
    ("evaluate_unlearning", "{relearn_lr: auto, retrained_name: models/twin}", False),
    ("evaluate_unlearning", "relearn_lr: often", True),
    ("evaluate_unlearning", "split: half", True),
])  # fmt: skip
def test_what_a_schema_refuses_the_parser_refuses_too(tmp_path, name, text, wrong):
    (tmp_path / "config.yaml").write_text(text + "\n")
    assert bool(faults(schema_of(name), yaml.safe_load(text))) == wrong
    assert is_refused(PARSERS[name], [f"--config={tmp_path / 'config.yaml'}"]) == wrong


@pytest.mark.parametrize(("changes", "wrong"), [
    ({}, False),
    ({"beta": 0.5}, False),
    ({"beta": 0}, True),
    ({"ceiling": 6}, True),  # of ascent, not of npo
    ({"prefill_tokens": 5}, True),  # of another draw
    ({"only_given": True}, False),
    ({"loss": "unheard"}, True),
    ({"draw": "unheard"}, True),
    ({"name": None}, True),
    ({"weight": -1}, True),
    ({"tokens": "last"}, True),
    ({"unheard": 1}, True),
])  # fmt: skip
def test_a_term_of_a_recipe_is_held_to_its_draw_and_its_loss(tmp_path, changes, wrong):
    recipe = {"terms": [SELECTED | changes], "optimizer": {"warmup_steps": 3}, "options": {"batch_size": 4}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert bool(faults(schema_of("recipe"), recipe)) == wrong
    assert is_refused(parse_run, [f"--method={tmp_path / 'recipe.yaml'}"]) == wrong


@pytest.mark.parametrize("recipe", [
    {"terms": []}, {"optimizer": {}},
    {"terms": [SELECTED], "optimiser": {}}, {"terms": [SELECTED], "lora": {"rank": 0}},
    {"terms": [SELECTED], "options": {"model_save_dir": "models/mine"}},
    {"terms": [SELECTED, {"name": "first", "sequences_of": "forget", "draw": "answer", "loss": "nll"}]},
], ids=str)  # fmt: skip
def test_a_recipe_that_is_none_is_refused_by_both(tmp_path, recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert faults(schema_of("recipe"), recipe)
    assert is_refused(parse_run, [f"--method={tmp_path / 'recipe.yaml'}"])
