"""What a page tells a reader to type, and a folder in which those commands run on a tiny model within seconds."""

import glob
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import yaml
from conftest import ROOT, make_tokenizer, run_cli, tiny_model

PYTHON = ("python", ".venv/bin/python")
ROWS = 8  # of each file of rows
LAYERS = 9  # of a model; configs/demo.yaml freezes 8
RUN = ["--max_answer_tokens=8", "--dtype=fp32", "--threads=1", "--text_window=16"]
SMALL = {  # what is added to a script's words: the least that goes through all of it
    "unlearn_harm.py": ["--max_unlearn_steps=2", *RUN],
    "finetune.py": ["--max_steps=2", *RUN],
    "evaluate_unlearning.py": ["--prompts_per_group=4", "--max_new_tokens=4", "--text_window=16", *RUN[1:3]],
}
MODELS = {  # names that pages use -> family
    "models/smollm2-135m-instruct": "llama",
    "facebook/opt-1.3b": "opt",
    "YOUR_MODEL": "llama",
}
FILES = {  # a reader's own files, and those of the hub and of a package -> what stands for them
    "my_prompts.jsonl": "recipes/harm/rows.jsonl",
    "data/harmbench.jsonl": "recipes/harm/rows.jsonl",
    "PKU-Alignment/PKU-SafeRLHF/rows.jsonl": "recipes/harm/rows.jsonl",
    "other_facts.jsonl": "recipes/people/rows.jsonl",
    "other_people.jsonl": "recipes/facts/rows.jsonl",
    "book.txt": "data/planted/story.txt",
    "later_book.txt": "data/planted/unseen.txt",
    "other_books/bees.txt": "data/planted/kept_bees.txt",
}
TRUTHFULQA = "Question,Best Answer,Correct Answers,Incorrect Answers\n" + "".join(
    f"What is {i} plus {i}?,{2 * i},{2 * i}; it is {2 * i},{3 * i}\n" for i in range(ROWS)
)


# ------------------------------------------------------------------------------------------- what a page says
def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page in a language; those that are indented are "bash"."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
    text = page.read_text()
    found = [body for name, body in fence.findall(text) if name == language]
    return found + (re.findall(r"(?:^ {4}.*\n)+", fence.sub("", text), re.M) if language == "bash" else [])


def commands(page: Path) -> list[list[str]]:
    """The commands of a page's blocks, in order, as a shell would split them."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def makes(page: Path) -> list[list[str]]:
    """All that a page calls make with, also in its sentences and tables."""
    said = [shlex.split(text) for text in re.findall(r"`(make [a-z][^`]*)`", page.read_text())]
    return [words for words in commands(page) if words[0] == "make"] + said


# ----------------------------------------------------------------------------------------- where it can be run
def working_folder(folder: Path, rows: Path | None = None) -> Path:
    """Lay out what a clone holds, data of a few rows, and tiny models under the names that pages use.

    rows: the page's own rows.jsonl.
    """
    for name in ("recipes", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    for path in (*(ROOT / "data").glob("*.jsonl"), *(ROOT / "data/planted").glob("*.*")):
        copy_short(path, folder / path.relative_to(ROOT))
    for name, source in FILES.items():
        copy_short(ROOT / source, folder / name)
    (folder / "data/TruthfulQA.csv").write_text(TRUTHFULQA)
    for path in folder.glob("recipes/*/ledger.yaml"):
        content = yaml.safe_load(path.read_text())
        for section, script in (("run", "unlearn_harm.py"), ("evaluation", "evaluate_unlearning.py")):
            content[section] |= dict(word[2:].split("=") for word in SMALL[script])
        path.write_text(yaml.safe_dump(content))
    shutil.copy(folder / "recipes/consent/ledger.yaml", folder / "my_ledger.yaml")
    if rows:
        shutil.copy(rows, folder / "rows.jsonl")
    for name, family in MODELS.items():
        tokenizer = make_tokenizer("opt" if family == "opt" else "chat")
        tiny_model(family, len(tokenizer), LAYERS).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def copy_short(source: Path, target: Path) -> None:
    """Copy a file; of rows the first few, but of the planted ones all, since setup_planted.py counts them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = source.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:ROWS] if source.suffix == ".jsonl" and source.parent.name != "planted" else lines))


def planned(words: list[str], folder: Path) -> list[list[str]]:
    """The commands that make would run in a working folder; fails if it has no rule for them."""
    for name in ("Makefile", "setup_planted.py", *(path.name for path in ROOT.glob("requirements*.txt"))):
        shutil.copy(ROOT / name, folder / name)
    for name in (".venv", ".venv-lm-eval", ".venv-signing"):  # installed, as far as make can tell
        (folder / name).mkdir(exist_ok=True)
        (folder / name / ".installed").touch()
    plain = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(["make", "--dry-run", *words[1:]], cwd=folder, capture_output=True, text=True, env=plain)
    assert run.returncode == 0, (words, run.stderr)
    return [shlex.split(line) for line in run.stdout.splitlines()]


def run_as_pasted(words: list[str], folder: Path):
    """Run one command of a page in a working folder, with what keeps it small added; fails unless it succeeds."""
    launcher, script, *rest = words
    assert launcher in PYTHON, words
    rest = [name for word in rest for name in (shell_pattern(word, folder) if "*" in word else [word])]
    run = run_cli(script, *rest, *SMALL.get(script, []), cwd=folder)
    assert run.returncode == 0, (" ".join(words), run.stdout, run.stderr)
    return run


def shell_pattern(pattern: str, folder: Path) -> list[str]:
    """The files that a pattern names, as a shell puts them in its place."""
    return sorted(glob.glob(pattern, root_dir=folder)) or [pattern]
