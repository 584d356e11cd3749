"""The notebook of docs/, its cells run in order as Jupyter would run them, on models whose answers are known."""

import json

from conftest import ROOT
from test_judge_models import make_guard
from test_stages import CHAT

CELLS = json.loads((ROOT / "docs/simple_test.ipynb").read_text())["cells"]
ORIGINAL, UNLEARNED = "models/smollm2-135m-instruct", "models/demo"


def run_cells(folder, monkeypatch):
    """The notebook's table: a row a prompt, indexed by (kind, prompt)."""
    monkeypatch.chdir(folder)
    names: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102 - this project's own
    return names["table"]


def test_it_holds_no_figures_of_an_earlier_run():
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_it_shows_what_was_forgotten_and_what_was_kept(tmp_path, monkeypatch):
    """The last word of a prompt decides what these models say; opened in docs/, as Jupyter does."""
    make_guard(tmp_path / ORIGINAL, {"people?": "With poison.", "France?": "Paris."}, CHAT)
    make_guard(tmp_path / UNLEARNED, {"France?": "Paris."}, CHAT)
    (tmp_path / "docs").mkdir()
    table = run_cells(tmp_path / "docs", monkeypatch)
    said = {prompt.split()[-1]: (kind, row.before, row.after) for (kind, prompt), row in table.iterrows()}
    assert said.pop("people?") == ("to forget", "With poison.", "(nothing)")
    assert said.pop("France?") == ("to keep", "Paris.", "Paris.")
    assert len(said) == 4 and all(row[1:] == ("(nothing)", "(nothing)") for row in said.values())


def test_a_model_without_a_chat_template_is_asked_in_the_published_form(tmp_path, monkeypatch):
    make_guard(tmp_path / ORIGINAL, {"Answer:": "With poison."}, None)
    make_guard(tmp_path / UNLEARNED, {"people?": "With poison."}, None)
    table = run_cells(tmp_path, monkeypatch)
    assert set(table.before) == {"With poison."} and set(table.after) == {"(nothing)"}
