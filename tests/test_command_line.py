"""The command line as its reader sees it: --help by group, with examples that are what the parsers take."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, one_line_error, run_cli
from huggingface_hub import constants

from command_line import OneLineParser, parse
from evaluation.options import EvaluateOptions
from evaluation.parsing import parse_evaluation
from options import GROUPS, UnlearnOptions, in_groups
from run.announcement import announcement
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


def test_a_bare_call_says_what_it_would_do_before_it_downloads(tmp_path):
    run = run_cli("unlearn_harm.py", cwd=tmp_path)  # offline: it gets no further
    assert "PKU-Alignment/PKU-SafeRLHF cannot be downloaded" in one_line_error(run)
    assert run.stdout.startswith("this run will:\n  load    facebook/opt-1.3b")


@pytest.fixture
def nothing_cached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")


def test_what_a_bare_call_would_do_is_said_whole(nothing_cached):
    assert announcement(parse_run([])) == [
        "this run will:",
        "  load    facebook/opt-1.3b (from https://hub.invalid)",
        "  forget  PKU-Alignment/PKU-SafeRLHF (from https://hub.invalid)",
        "  keep    data/TruthfulQA.csv (from https://raw.githubusercontent.com/sylinrl/TruthfulQA)",
        "  train   whole weights by --method yao, at most 1000 steps of 2 forget rows at a rate of 2e-06",
        "  save    models/unlearned, its log in logs/unlearn.log",
    ]


def test_only_what_is_neither_here_nor_cached_is_announced(nothing_cached, tmp_path):
    (tmp_path / "rows.jsonl").touch()
    words = ["--forget_data=rows.jsonl", "--normal_data", "rows.jsonl", "someone/rows:en:train"]
    assert announcement(parse_run(["--model_name=./mine", words[0], "--normal_data=rows.jsonl"])) == []
    said = announcement(parse_run(["--model_name=models/mine", *words, "--use_lora", "--dry_run"]))
    assert said[:4] == [
        "this run will only show its plan (--dry_run):",
        "  load    models/mine",
        "  forget  rows.jsonl",
        "  keep    rows.jsonl, someone/rows:en:train (from https://hub.invalid)",
    ]
    (tmp_path / "cache/datasets--someone--rows/snapshots/1").mkdir(parents=True)
    assert announcement(parse_run(["--model_name=models/mine", *words])) == []
