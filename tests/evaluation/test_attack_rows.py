"""Which rows an attack asks, shows and teaches."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest

from engine.trained_on import TrainedOn
from evaluation.attacks.base import AskedRow, AttackConfig
from evaluation.attacks.rows import ExampleMaker, Said, collect_data, forgotten_rows, read_relearn_data
from evaluation.groups import Group
from evaluation.judges.reference import ReferenceJudge, reference_of
from evaluation.judges.refusals import is_refusal
from evaluation.options import EvaluateOptions
from prompts.windows import Passage, ask_to_go_on, whole
from sources.rows import Row
from utils import UsageError

ROWS = [AskedRow(row=Row(f"p{i}", f"a{i}"), id=str(i), judge="outcome") for i in range(4)]


def judge(rows, texts):
    """A judge to whom an answer is given if it says yes."""
    return [Said("yes" if "yes" in text else "no", "yes" in text) for text in texts]


def test_attacked_are_forgotten_prompts_of_every_group(caplog):
    """Taken in their order, all attacked prompts would be of the first group, and the rest would go untested."""

    def line(group, i, before=True, after=False, style="chat", **more):
        return {"id": "1", "group": group, "side": "forget", "counts": True, "style": style, "judge": "mine",
                "prompt": f"{group} {i}", "before": {"answered": before, "answer": "a"},
                "after": {"answered": after}} | more  # fmt: skip

    lines = [line(group, i, reference="r") for group in ("first (unseen)", "second (unseen)") for i in range(30)]
    lines += [line("first (trained)", 1), line("never", 1, before=False), line("still", 1, after=True),
              line("pasted", 1, style="qa"), line("shown (unseen)", 1, counts=False), line("kept", 1, side="keep"),
              line("unread (unseen)", 1, before=None, after=None), line("book (unseen)", 1, text=True)]  # fmt: skip
    groups = [Group(asked["group"], "", "forget", "chat", [Row(asked["prompt"], asked.get("reference"))])
              for asked in lines]  # fmt: skip
    found = forgotten_rows(lines, groups, "chat", 20, 3, ["suffix"])
    assert len({asked.id for asked in found.rows}) == 20
    groups_asked = [asked.group for asked in found.rows]
    assert [groups_asked.count(name) for name in ("first (unseen)", "second (unseen)")] == [10, 10]
    few = forgotten_rows(lines[:3] + lines[30:60], groups, "chat", 20, 3, ["suffix"])
    assert sum(asked.group == "second (unseen)" for asked in few.rows) == 17, "what a small group lacks, others give"
    for asked in found.rows:
        assert asked.row.prompt.rpartition(" ")[0] == asked.group
        assert (asked.row.response, asked.judge, asked.reference) == ("a", "mine", "r")
    assert found.summary() == {"rows": 20, "not_attacked": ["book (unseen)"]}
    assert "not on book (unseen): none of those asked for reads text" in caplog.text
    assert len(forgotten_rows(lines, groups, "chat", 100, 3, ["suffix"]).rows) == 60


def test_an_attack_is_judged_by_what_tells_the_answer_from_the_others_of_its_row():
    """Most of a wrong answer's words are the right one's: without the others beside it, "in Tarn" is half of it."""
    row = Row("Where?", "He was born in Oslo.", perturbed=("He was born in Tarn.", "He was born in Lund."))
    line = {"group": "facts (unseen)", "side": "forget", "counts": True, "style": "chat", "judge": "reference",
            "prompt": row.prompt, "reference": row.response, "before": {"answered": True, "answer": row.response},
            "after": {"answered": False}}  # fmt: skip
    (asked,) = forgotten_rows([line], [Group("facts", "unseen", "forget", "chat", [row])], "chat", 5, 1, []).rows
    said = ReferenceJudge(is_refusal).judge(
        ["", ""], ["He was born in Tarn.", "In Oslo."], [reference_of(asked.row)] * 2
    )
    assert [judgement.label for judgement in said] == ["other", "given"]


def passages_of(count: int, stride: int, size=8) -> list[Passage]:
    """Passages of one text, at half of which it is to go on: their tokens are their places in it."""
    return [ask_to_go_on(Passage("", "", source="b", document="b", is_text=True, text=f"begin {i} end {i}",
                                 token_ids=tuple(range(i * stride, i * stride + size)), start=i * stride, middle=7))
            for i in range(count)]  # fmt: skip


def test_attacked_passages_are_forgotten_ones_that_share_no_token():
    rows = passages_of(20, 4)
    group = Group("book", "unseen", "forget", "raw", rows)
    lines = [{"id": "1", "group": group.name, "side": "forget", "counts": True, "style": "raw", "judge": "reference",
              "prompt": row.prompt, "reference": row.response, "text": True, "before": {"answered": True},
              "after": {"answered": i == 3}} for i, row in enumerate(rows)]  # fmt: skip
    found = forgotten_rows(lines, [group], "chat", 50, 3, ["quantise"])
    starts = sorted(asked.row.start for asked in found.rows)
    assert found.not_attacked == [] and 12 not in starts and len(starts) >= 5
    assert all(later - earlier >= 8 for earlier, later in itertools.pairwise(starts))
    assert all(asked.reference == asked.row.response and asked.row.shown == 4 for asked in found.rows)
    assert len(forgotten_rows(lines, [group], "chat", 2, 3, ["quantise"]).rows) == 2


def test_no_token_of_an_attacked_passage_is_taught_and_no_answer_of_an_attacked_prompt(tmp_path):
    rows = passages_of(20, 4)
    attacked = [AskedRow(row=rows[5], reference=rows[5].response)]
    splits = {
        "forget": {"b": {"train": [whole(row) for row in rows]}},
        "keep": {"k": {"train": [Row("plain", "yes")]}, "t": {"train": [Row("", "kept", is_text=True)]}},
    }
    data = collect_data(attacked, splits, {}, {"examples", "relearn"}, maker(tmp_path))
    assert {row.start for row in data.forget_train_rows} <= {4 * i for i in range(20) if abs(i - 5) > 1}
    assert all(row.shown == 0 for row in data.forget_train_rows) and len(data.forget_train_rows) == 17
    assert [taught.name for taught in data.relearn_sets] == ["forgotten rows", "k", "t"]
    assert [row.response for row in data.keep_rows] == ["kept"]
    fact = [AskedRow(row=Row("When was he born?", "In 1926."), reference="In 1926.")]
    told = [Row("In which year did he come into the world?", "in 1926. "), Row("Where?", "In Rome.")]
    data = collect_data(fact, {"forget": {"p": {"train": told}}, "keep": {}}, {}, {"examples"}, maker(tmp_path))
    assert [row.prompt for row in data.forget_train_rows] == ["Where?"]


def maker(tmp_path=None, **said) -> ExampleMaker:
    """A maker of examples whose original says "yes" or what it is given for a prompt."""
    options = EvaluateOptions(model_name=str(tmp_path or "none"))
    formatter = SimpleNamespace(prompt_of=lambda row, ask: row.prompt)
    return ExampleMaker(original=said, formatter=formatter, judge=judge, options=options,
                        config=AttackConfig(max_new_tokens=5, batch_size=8, seed=1))  # fmt: skip


@pytest.fixture(autouse=True)
def original_says(monkeypatch):
    generate = lambda said, formatter, prompts, **_: [(said.get(p, "yes"), True) for p in prompts]  # noqa: E731
    monkeypatch.setattr("evaluation.attacks.rows.generate", generate)


def test_an_adversary_teaches_answers_and_no_refusals():
    """Answers that came with the rows are what is to come back; an original's silence or refusal brings nothing."""
    rows = [Row("lock", "Take the red pick."), Row("door"), Row("safe"), Row("gate")]
    found = maker(safe="", gate="I cannot help with that.").add_answers(rows)
    assert [(row.prompt, row.response) for row in found] == [("lock", "Take the red pick."), ("door", "yes")]


def test_only_what_was_trained_on_is_taught_back_and_never_what_is_asked(tmp_path):
    """Rows of the training split that no step came to were never forgotten."""
    asked = [Row(f"trained {i}", "An answer.") for i in range(6)]
    never = [Row(f"never {i}", "An answer.") for i in range(3)]
    TrainedOn().with_run({"forget": [row.key for row in asked], "normal": []}).write(tmp_path)
    attacked = [AskedRow(row=Row("Trained  0", "yes"), id="0")]  # the same prompt but for case and spaces
    splits = {"forget": {"a": {"train": asked + never}},
              "keep": {f"dir/{name}.csv": {"train": [Row(f"{name} {i}") for i in range(5)], "test": []}
                       for name in ("late", "early", "third")}}  # fmt: skip
    data = collect_data(attacked, splits, {}, {"examples", "relearn"}, maker(tmp_path))
    sets = {taught.name: sorted(row.prompt for row in taught.rows) for taught in data.relearn_sets}
    assert sets == {"forgotten rows": [f"trained {i}" for i in range(1, 6)],
                    "late": [f"late {i}" for i in range(5)], "early": [f"early {i}" for i in range(5)]}  # fmt: skip
    assert {row.prompt.split()[0] for row in data.keep_rows} <= {"late", "early", "third"} and data.keep_rows
    assert all(taught.measured is None for taught in data.relearn_sets)


def test_where_all_forgotten_rows_are_asked_half_of_them_are_taught_and_the_other_half_asked(tmp_path):
    rows = [Row(f"fact {i}", f"yes {i}") for i in range(5)]
    attacked = [AskedRow(row=dataclasses.replace(row, response="what the original said"), reference=row.response)
                for row in rows]  # fmt: skip
    data = collect_data(attacked, {"forget": {"a": {"train": rows}}, "keep": {}}, {}, {"relearn"}, maker(tmp_path))
    (taught,) = data.relearn_sets
    assert taught.name == "half of the forgotten rows"
    assert [(row.prompt, row.response) for row in taught.rows] == [(f"fact {i}", f"yes {i}") for i in (0, 2, 4)]
    assert taught.measured == [1, 3]


def test_a_set_of_ones_own_is_taught_instead_without_what_is_asked(tmp_path, caplog):
    file = tmp_path / "mine.jsonl"
    lines = [{"prompt": "p0", "response": "x"}, {"prompt": "other", "response": "y"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sets = read_relearn_data(EvaluateOptions(relearn_data=[str(file)]))
    data = collect_data(ROWS, {"forget": {}, "keep": {"k.csv": {"train": [Row("k")]}}}, sets, {"relearn"}, maker())
    assert [(s.name.rpartition("/")[2], [row.prompt for row in s.rows]) for s in data.relearn_sets] == [
        ("mine", ["other"])
    ]
    assert "1 of its rows are asked by the attack, or hold an answer that it looks for, and are not" in caplog.text
    with pytest.raises(UsageError, match="--relearn_data mine: holds no row to teach"):
        collect_data(ROWS, {"forget": {}, "keep": {}}, {"mine": [Row("p1", "x")]}, {"relearn"}, maker())
