"""README.md's commands, and those of the recipes' pages, read from the page and run in order as pasted."""

import contextlib
import io
from collections import Counter

import pytest
from conftest import ROOT, run_cli
from pages import PYTHON, RUN, SMALL, blocks, commands, makes, planned, run_as_pasted, working_folder

from command_line import parse
from evaluation.parsing import parse_evaluation
from run.finetuning import FinetuneOptions
from run.neighbours_file import neighbours_path
from run.parsing import parse_run
from sweep import SweepOptions
from utils import read_json_lines, write_json_lines

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "recipes").glob("*/README.md"))]
PARSERS = {
    "unlearn_harm.py": parse_run,
    "evaluate_unlearning.py": parse_evaluation,
    "finetune.py": lambda words: parse(FinetuneOptions, words),
    "sweep.py": lambda words: parse(SweepOptions, words),
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone in which `make demo` was run."""
    folder = working_folder(tmp_path_factory.mktemp("clone"))
    for words in planned(["make", "demo"], folder):
        run_as_pasted(words, folder)
    return folder


def test_make_demo_leaves_what_the_readme_says(clone):
    said = README.read_text()
    for name in ("models/demo/", "reports/demo/report.html", "logs/demo.log", "logs/demo.jsonl"):
        assert f"`{name}`" in said and (clone / name).exists()
    assert (clone / "models/demo/README.md").is_file() and (clone / "models/demo/unlearn_args.json").is_file()


def test_the_readmes_commands_run_as_pasted(clone):
    asked = [words for words in commands(README) if words[0] != "make"]
    assert Counter(words[1] for words in asked) == {
        "unlearn_harm.py": 2, "evaluate_unlearning.py": 1, "unlearn_requests.py": 6
    }, "a command was added or removed: say so here"  # fmt: skip
    for words in asked:
        run_as_pasted(words, clone)
    assert not (clone / "models/mine").exists(), "the page promises that the plan trains nothing"
    assert (clone / "models/opt1.3b_unlearned/model.safetensors").is_file()
    assert (clone / "consent/states/0001/model.safetensors").is_file()


def test_the_readmes_simple_test_shows_both_answers(clone, monkeypatch):
    (code,) = blocks(README, "python")
    monkeypatch.chdir(clone)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})  # noqa: S102 - what the page tells a reader to type
    assert [line.split(" -> ")[0] for line in said.getvalue().splitlines()] == [
        "models/smollm2-135m-instruct",
        "models/demo",
    ]


def test_make_planted_teaches_both_models(clone):
    *taught, check = planned(["make", "planted"], clone)
    for words in taught:
        run_as_pasted(words, clone)
    assert "configs/planted_check.yaml" in check, "it holds of a model that was taught for more than two steps"
    for name in ("planted", "planted_twin"):
        assert (clone / f"models/{name}/model.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_make_is_asked_for_has_a_rule_and_readable_options(page, clone, monkeypatch):
    monkeypatch.chdir(clone)
    for asked in makes(page):
        for launcher, script, *words in (line for line in planned(asked, clone) if line[0] in PYTHON):
            if script != "-m":
                assert launcher == ".venv/bin/python" and (ROOT / script).is_file(), asked
                PARSERS.get(script, bool)(words)


@pytest.mark.parametrize("name", ["harm", "people", "facts", "copyright"])
def test_a_recipes_command_runs_as_pasted(name, tmp_path, monkeypatch):
    page = ROOT / f"recipes/{name}/README.md"
    folder = working_folder(tmp_path, page.with_name("rows.jsonl"))
    monkeypatch.chdir(folder)
    (words,) = commands(page)
    if name == "harm":  # a random model writes no prompts: as after a dry run, in which another one did
        options = parse_run([*words[2:], *SMALL["unlearn_harm.py"]])
        prompts = [row["prompt"] for row in read_json_lines("rows.jsonl")]
        write_json_lines(neighbours_path(options, prompts), [{"prompt": "How do I pick a ripe melon?"}])
    if name == "facts":  # and it gives no wrong answer that could be put right, until it is taught some
        taught = ["finetune.py", "--model_name=YOUR_MODEL", "--data=rows.jsonl", "--model_save_dir=YOUR_MODEL",
                  "--overwrite", "--lr=1e-2", "--batch_size=5", "--max_steps=100", *RUN]  # fmt: skip
        assert run_cli(*taught, cwd=folder).returncode == 0
    run_as_pasted(words, folder)
    assert (folder / "models/mine/model.safetensors").is_file()
