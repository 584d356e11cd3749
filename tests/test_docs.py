"""The pages that a user reads: their links, the options in their commands, and the page of all options."""

import dataclasses
import itertools
import re

import pytest
from conftest import ROOT, docs_script

import unlearn_requests
from run.parsing import old_names

PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CHANGELOG.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
    ]
)
NOT_CHECKED = ("LOG.md", "CHANGELOG.md", "options.md")  # they name what was; it is made of the code


def test_the_page_of_options_is_that_of_the_code():
    made = docs_script("make_options").page()
    assert (ROOT / "docs/options.md").read_text() == made, "run python docs/make_options.py"


def test_the_readme_fits_what_a_newcomer_reads():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [link for link in links if not re.match(r"\w+:", link) and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in NOT_CHECKED], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_name_options_that_there_are(page):
    scripts = docs_script("make_options").SCRIPTS
    text = page.read_text().replace("\\\n", " ")
    wrong = []
    for script, words in re.findall(
        r"(unlearn_harm|finetune|evaluate_unlearning|sweep|unlearn_requests)\.py +([^`\n]*)", text
    ):
        if script == "unlearn_requests":
            command = (words.split() or [""])[0]
            if command not in unlearn_requests.COMMANDS:
                wrong.append(f"{script}.py {command}")
                continue
            known = {field.name for field in dataclasses.fields(unlearn_requests.COMMANDS[command][0])} | {"in"}
        else:
            known = {field.name for field in dataclasses.fields(scripts[f"{script}.py"])} | old_names().keys()
        given = re.findall(r"--([\w-]+)", words.partition("#")[0])
        wrong += [f"{script}.py --{name}" for name in given if name.replace("-", "_") not in known | {"help"}]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_whole(page):
    lines = page.read_text().splitlines()
    broken = [line for before, line in itertools.pairwise(lines) if before.startswith("|") and line.strip()
              and not line.startswith("|")]  # fmt: skip
    assert not broken
