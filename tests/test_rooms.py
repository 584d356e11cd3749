"""The files at the top import one way: hub, utils, options, command_line, sources, data_module, rooms, scripts."""

import ast

import pytest
from conftest import ROOT

ROOMS = {"sources", "prompts", "engine", "method", "evaluation", "run", "ledger"}
MAY_IMPORT = {
    "hub": set(),
    "utils": {"hub"},
    "options": {"utils"},
    "command_line": {"utils", "options"},
    "data_module": {"utils", "options", "sources", "prompts"},
    "setup_demo": {"utils", "options"},
    "setup_planted": {"utils", "command_line", "sources"},
    "finetune": {"utils", "command_line", "unlearn_harm", *ROOMS},
    "unlearn_harm": {"utils", "options", "data_module", *ROOMS},
    "evaluate_unlearning": {"utils", "options", "data_module", *ROOMS},
    "sweep": {"utils", "options", "command_line", "data_module", *ROOMS},
    "unlearn_requests": {"utils", "command_line", *ROOMS},
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines


def imported(tree: ast.Module) -> set[str]:
    """The first part of every module that a file imports, inside functions too."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def test_the_top_holds_what_a_person_runs_and_imports_one_way():
    assert {file.stem for file in ROOT.glob("*.py")} == MAY_IMPORT.keys()
    for name, allowed in MAY_IMPORT.items():
        taken = imported(ast.parse((ROOT / f"{name}.py").read_text())) & (MAY_IMPORT.keys() | ROOMS)
        assert taken <= allowed, name


@pytest.mark.parametrize("room", [".", "benchmarks", "tests", *sorted(ROOMS)])
def test_no_file_and_no_function_is_too_long_to_be_read(room):
    for file in (ROOT / room).glob("*.py" if room == "." else "**/*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= LONGEST_FILE, file
        for node in ast.walk(ast.parse(text)) if room != "tests" else ():
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < LONGEST_FUNCTION, (file, node.name)


def test_every_room_says_what_it_knows():
    for room in ROOMS:
        said = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text()))
        assert "Knows" in said and "Must never know" in said, room
