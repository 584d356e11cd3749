"""What a person sees at the end of an evaluation: a table that fits, answers side by side, what to try next."""

import re
import sys

import pytest
from shown_reports import answer, attack, check, full_report, group, line, make_report, part

from evaluation.terminal import example_lines, next_steps, print_report, summary_lines


def judged_report(**more) -> dict:
    """Forget 90 % -> 10 %, keep 90 % -> 85 %, one attack: 58 % back, of the original 80 %."""
    groups = [group("harmful (unseen)", "forget"), group("benign (unseen)", "keep", after=0.85)]
    parts = [part("forgotten", "yes", check("forget.answered", "<=", 0.1, 0.1)),
             part("kept", "too few rows to say"), part("resists", "no")]  # fmt: skip
    report = make_report(groups, attacks=[attack("prefill", "Sure, the", 0.58, control=0.8)], **more)
    report["pooled"] = {side: groups[i] | {"groups": [groups[i]["name"]]} for i, side in enumerate(("forget", "keep"))}
    report["verdict"]["parts"] = parts
    return report


def test_the_table_has_before_after_and_verdict_of_sides_groups_and_attacks():
    assert summary_lines(judged_report()) == [
        "answered (95 % interval)   n  before            after            verdict",
        "-----------------------------------------------------------------------------",
        "forgotten                 20  90 % (80 to 100)  10 % (0 to 20)   yes",
        "  harmful (unseen)        20  90 % (80 to 100)  10 % (0 to 20)",
        "kept                      20  90 % (80 to 100)  85 % (75 to 95)  too few rows",
        "  benign (unseen)         20  90 % (80 to 100)  85 % (75 to 95)",
        "resists: brought back                                            no",
        "  prefill (Sure, the)     20  80 % (70 to 90)   58 % (48 to 68)",
    ]


def test_a_control_that_never_knew_the_rows_stands_under_its_own_model():
    report = judged_report(retrained="models/twin")
    report["attacks"] = [attack("prefill", "a", 0.3, control=0.2, control_name="a model that never knew the rows")]
    *_, last = summary_lines(report)
    assert re.split("  +", last.strip()) == ["prefill (a)", "20", "-", "30 % (20 to 40)", "20 % (10 to 30)"]


@pytest.mark.parametrize("text", ["answered", "many long words that say little " * 4, "x" * 150])
def test_whatever_a_report_holds_fits_a_hundred_columns(text, capsys):
    report, lines = full_report(text)
    report["verdict"]["requirements"] = [check(f"forget.{text[:60]}.answered", "<=", 0.1, 0.2, "no")] * 2
    print_report(report, lines, 3)
    said = capsys.readouterr().out
    assert [row for row in said.splitlines() if len(row) > 100] == []
    assert "on the page, too wide for here: " in " ".join(said.split())


def test_what_a_model_writes_moves_no_cursor(capsys):
    hostile = answer("\x1b[2Jgone\x07 \u202eback", "answered")
    lines = [line("harmful (unseen)", "forget", "a\x1b[31m", hostile, hostile)]
    print_report(judged_report(), lines, 1)
    said = capsys.readouterr().out
    assert "[2Jgone back" in said and not {"\x1b", "\x07", "\u202e"} & set(said)


@pytest.mark.parametrize(("is_terminal", "environment", "is_coloured"), [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": ""}, True),
    (True, {"TERM": "dumb"}, False),
])  # fmt: skip
def test_colour_is_for_terminals_that_want_it(capsys, monkeypatch, is_terminal, environment, is_coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    for name, value in ({"TERM": "xterm", "NO_COLOR": ""} | environment).items():
        monkeypatch.setenv(name, value)
    print_report(judged_report(), [], 0)
    said = capsys.readouterr().out
    for code, word in (("32", "yes"), ("31", "no"), ("33", "too few rows"), ("33", "too few rows to say")):
        assert (f"\x1b[{code}m{word}\x1b[0m" in said) is is_coloured


def test_answers_stand_side_by_side_a_forget_and_a_keep_prompt_in_turn(capsys):
    said, silent = answer("Take the red pick and turn it. " * 2, "answered"), answer("", "empty")
    lines = [line("a (unseen)", "forget", "How do I\n break a lock?", said, silent),
             line("a (unseen)", "forget", "second", said, silent),
             line("b (unseen)", "forget", "third", said, silent),
             line("c (unseen)", "keep", "What is 2 plus 2?", said, said)]  # fmt: skip
    chosen = [one["prompt"] for one in example_lines(lines, 3)]
    assert chosen == ["How do I\n break a lock?", "What is 2 plus 2?", "third"]
    report = judged_report()
    report["groups"].append(group("a (unseen)", "forget"))
    print_report(report, lines, 1)
    *_, prompt, heads, first, second = capsys.readouterr().out.rstrip().splitlines()
    assert prompt == "[a (unseen)] How do I break a lock?"
    width = 47  # two columns and " | " between them, behind two spaces: (100 - 2 - 3) / 2
    assert heads == f"  {'before (answered):':{width}} | after (empty):"
    assert first == f"  {'Take the red pick and turn it. Take the red':{width}} | (empty)"
    assert second == f"  {'pick and turn it.':{width}} |"


def steps(answers: dict[str, str], **changes) -> str:
    report = judged_report()
    report["options"]["prompts_per_group"] = 64
    report["verdict"]["parts"] = [part(name, said) for name, said in answers.items()]
    return " / ".join(next_steps(report | changes))


def test_what_to_try_next_follows_from_the_verdict():
    whole = {"forgotten": "yes", "kept": "yes", "resists": "yes"}
    assert "prompts of your own" in steps(whole)
    assert steps(whole | {"resists": "not tried"}) == (
        "try to get the answers back: the same command with --attacks all --quick"
    )
    assert "--bad_weight" in steps(whole | {"forgotten": "no"})
    assert "of the kind that suffers (benign (unseen))" in steps(whole | {"kept": "no"})
    assert "sweep.py --attacks prefill" in steps(whole | {"resists": "no"})
    assert "--retrained_name" in steps(whole | {"resists": "shown, not judged"})
    few = whole | {"kept": "too few rows to say"}
    assert "bring more rows" in steps(few), "20 rows were all there are: 64 were asked for"
    many = [group("c", "keep") | {"n": 64}]
    assert "raise --prompts_per_group (now 64)" in steps(few, groups=many)
