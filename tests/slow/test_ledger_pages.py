"""The commands of the recipes' pages that keep a ledger, run as pasted; each `apply` starts two scripts."""

import json

import pytest
from conftest import ROOT
from pages import commands, run_as_pasted, working_folder


@pytest.mark.parametrize(("name", "ledger"), [("consent", "consent"), ("policy", "rules")])
def test_a_recipes_commands_run_as_pasted(name, ledger, tmp_path):
    folder = working_folder(tmp_path)
    rows = [{"prompt": f"Where did Jane Roe live in 19{i}?", "response": f"In house {i}."} for i in range(60, 66)]
    (folder / "data/town.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in commands(ROOT / f"recipes/{name}/README.md"):
        shown = run_as_pasted(words, folder)
    assert "in force" in shown.stdout, "the page's last command is `status`"
    assert (folder / ledger / "states/0001/model.safetensors").is_file()
