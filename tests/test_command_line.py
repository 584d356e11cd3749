"""The command line as its reader sees it: --help by group, with examples that are what the parsers take."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from command_line import OneLineParser, parse
from evaluation.options import EvaluateOptions
from evaluation.parsing import parse_evaluation
from options import GROUPS, UnlearnOptions, in_groups
from run.finetuning import FinetuneOptions
from run.parsing import parse_run
from sweep import SweepOptions

PARSERS = {
    "unlearn_harm.py": (UnlearnOptions, parse_run),
    "finetune.py": (FinetuneOptions, lambda argv: parse(FinetuneOptions, argv)),
    "evaluate_unlearning.py": (EvaluateOptions, parse_evaluation),
    "sweep.py": (SweepOptions, OneLineParser(SweepOptions).parse_args),
}
EXAMPLES = [command for kind, _ in PARSERS.values() for command in kind.EXAMPLES.values()]
MADE = ("models/smollm2-135m-instruct", "models/demo")  # by setup_demo.py and make demo


@pytest.mark.parametrize("command", EXAMPLES)
def test_an_example_of_the_help_is_taken_as_it_is_written(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    python, script, *argv = shlex.split(command)
    assert python == "python" and (ROOT / script).is_file()
    PARSERS[script][1](argv)
    inputs = re.findall(r"(?<!save_dir )(?<!sweep_dir )\b(?:models|data|configs|recipes)/[\w./-]+", command)
    assert inputs and all(Path(name).exists() for name in inputs if name not in MADE)


@pytest.mark.parametrize("script", PARSERS)
def test_help_has_each_option_once_in_its_group_and_the_common_ones_first(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    kind = PARSERS[script][0]
    text = OneLineParser(kind, prog=script).format_help()
    options, _, examples = text.partition("\nexamples:\n")
    shown = re.findall(r"^  --(\w+)", options, re.M)
    assert shown == [*(field.name for fields in in_groups(kind).values() for field in fields), "help"]
    assert shown[0] == ("config" if kind is SweepOptions else "model_name")
    heads = re.findall(r"^(\w.*):$", options, re.M)
    used = [GROUPS[group] for group in in_groups(kind) if group]
    assert heads == [*used, "options"] and (kind is SweepOptions or not in_groups(kind).get(None))
    assert examples.replace(" \\\n       ", "").count("    python ") == len(kind.EXAMPLES)
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_options_of_a_run_stand_in_seven_groups():
    groups = in_groups(UnlearnOptions)
    assert list(groups) == ["model", "data", "recipe", "run", "memory", "looking", "files"]
    first = {group: fields[0].name for group, fields in groups.items()}
    assert first["data"] == "forget_data" and first["recipe"] == "method" and first["memory"] == "use_lora"
