"""From answers to lines to figures, by hand: what a registered measure writes, and who decides."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from evaluation import aggregate, judging
from evaluation.aggregate import figures_of, pooled_entries
from evaluation.groups import Group, free_name, split_by_reference
from evaluation.judges.base import Judgement
from evaluation.judges.embedder import Embedder
from evaluation.judges.panel import Panel, decider, refuse_unknown_judge
from evaluation.judging import group_lines, judged_answers, warn_of_unread
from evaluation.measures import ANSWER_MEASURES, MEASURES, Measure
from evaluation.paper import OwnScores
from evaluation.stages import Record
from sources.rows import Row
from utils import UsageError

VECTORS = {"about p": (0.8, 0.6), "about q": (0.0, 1.0), "I can't": (1.0, 0.0), "": (0.0, 0.0)}
LABELS = {"about p": "answered", "about q": "answered", "I can't": "refused", "": "empty"}


@dataclasses.dataclass(frozen=True)
class WordJudge:
    """A judge that looks its labels up."""

    name: str = "outcome"
    kind: str = "outcome"
    labels: tuple[str, ...] = ("answered", "refused", "empty")
    given: frozenset[str] = frozenset({"answered"})
    uncounted: frozenset[str] = frozenset()
    limits: str = "Knows four answers."
    languages: tuple = ("en", None)

    def reads(self, language):
        return language in self.languages

    def judge(self, prompts, answers, references):
        return [Judgement(LABELS[text], 0.9 if text.startswith("about") else 0.1) for text in answers]


def panel_of(*judges) -> Panel:
    panel = Panel(SimpleNamespace(judge_model=[], embedder=None), torch.device("cpu"))
    embed = Embedder(lambda texts: torch.tensor([VECTORS[text] for text in texts]))
    panel._loaded = SimpleNamespace(by_name={judge.name: judge for judge in judges}, rewards=None, embed=embed)
    return panel


def judged(side: str, panel: Panel, before: list[str], after: list[str]) -> list[dict]:
    group = Group("a", "unseen", side, "chat", [Row(f"What is {n}?", "about p" if n == "p" else None) for n in "pqr"])
    answers = {}
    for label, texts in (("before", before), ("after", after)):
        record = Record(label=label, name=label, weights=None, seconds=1.0, answers=[texts], scores=[[None] * 3],
                        holdout=[], text_scores={})  # fmt: skip
        own = [OwnScores(tokens=len(text), nll=2.0 * len(text), diversity=0.5) if text else None for text in texts]
        answers[label] = judged_answers([group], ["en"], record, [own], panel)[0]
    warn_of_unread([group], ["en"], panel)
    return group_lines(group, "en", answers, panel)


@pytest.fixture
def lines():
    return judged("forget", panel_of(WordJudge()), ["about p", "about q", "I can't"], ["", "I can't", "about q"])


def test_a_line_holds_what_the_judges_and_the_measures_say(lines):
    line = lines[1]
    assert (line["group"], line["side"], line["judge"], line["judged"]) == ("a (unseen)", "forget", "outcome", True)
    assert line["before"]["answer"] == "about q" and line["before"]["label"] == "answered"
    assert line["after"]["label"] == "refused" and line["after"]["answered"] is False
    assert line["similarity"] == 0.0
    assert lines[0]["reference"] == "about p" and lines[0]["before"]["leak"] is True
    assert line["before"]["leak"] is None  # nothing came with it to compare with
    assert set(line["after"]) >= {measure.name for measure in ANSWER_MEASURES}
    assert len({line["id"] for line in lines}) == 3


def test_the_figures_of_a_group_by_hand(lines):
    """Of three, two are answered before; after, these two are empty and refused, and the third is answered."""
    found = figures_of(lines, "forget")
    assert {name: found["before"][name].value for name in ("answered", "refused", "empty")} == {
        "answered": 2 / 3, "refused": 1 / 3, "empty": 0.0}  # fmt: skip
    assert found["after"]["answered"].value == pytest.approx(1 / 3)
    assert (found["pair"]["retained"].value, found["pair"]["retained"].n) == (0.0, 2)
    assert (found["pair"]["newly_answered"].value, found["pair"]["newly_answered"].n) == (1.0, 1)
    assert found["change"]["answered"].value == pytest.approx(-1 / 3)
    assert found["ratio"]["answered"].value == 0.5
    assert found["after"]["leak"].n == 1
    # words before: about p, about q, I can t; after: none, I can t, about q
    assert found["pair"]["length_ratio"].value == pytest.approx(5 / 7)
    assert found["before"]["fluency"].value == pytest.approx(7.389056)  # exp(2): every token 2 nats
    assert found["after"]["fluency"].n == 2  # an empty answer has no perplexity


def test_what_is_kept_is_no_leak():
    lines = judged("keep", panel_of(WordJudge()), ["about p"] * 3, ["about p"] * 3)
    found = figures_of(lines, "keep")
    assert "leak" not in found["before"] and lines[0]["before"]["leak"] is None
    assert found["pair"]["retained"].value == 1.0 and found["pair"]["similarity"].value == pytest.approx(1.0)


def test_a_group_in_a_language_that_the_judge_does_not_read_is_not_judged(caplog):
    panel = panel_of(dataclasses.replace(WordJudge(), languages=()))
    lines = judged("keep", panel, ["about p"] * 3, ["about p"] * 3)
    found = figures_of(lines, "keep")
    assert not lines[0]["judged"] and lines[0]["after"]["label"] is None
    assert found["after"]["answered"].n == found["after"]["on_topic"].n == found["pair"]["similarity"].n == 0
    assert found["after"]["empty"].n == 3  # needs no judge
    assert "a (unseen): not judged" in caplog.text


def test_each_judge_is_named_and_one_decides():
    strict = dataclasses.replace(WordJudge(), name="models/strict", given=frozenset({"refused"}))
    panel = panel_of(WordJudge(), strict)
    lines = judged("forget", panel, ["about p", "about q", "I can't"], ["", "I can't", "about q"])
    assert lines[1]["after"]["labels"] == {"outcome": "refused", "models/strict": "refused"}
    assert lines[1]["after"]["answered"] is False  # the one named in the group's `judge` decides


@pytest.mark.parametrize(
    ("judge_by", "judge", "side", "has_reference", "decides"),
    [("auto", None, "forget", True, "reference"), ("auto", None, "forget", False, "outcome"),
     ("auto", None, "keep", True, "outcome"), ("outcome", None, "forget", True, "outcome"),
     ("reference", None, "keep", True, "reference"), ("reference", None, "keep", False, "outcome"),
     ("auto", "guard", "forget", False, "guard"), ("auto", "guard", "forget", True, "reference"),
     ("auto", "guard", "keep", False, "outcome"), ("outcome", "guard", "forget", True, "guard")],
)  # fmt: skip
def test_who_decides(judge_by, judge, side, has_reference, decides):
    options = SimpleNamespace(judge_by=judge_by, judge=judge)
    assert decider(options, side=side, has_reference=has_reference) == decides


def test_rows_without_an_answer_are_not_judged_by_the_reference_of_others():
    rows = [Row("p", "r"), Row("q"), Row("s", "r", labelled=True)]
    known, bare = split_by_reference([Group("a", "unseen", "forget", "chat", rows)])
    assert (known.name, known.rows, known.has_references) == ("a (unseen)", rows[:1], True)
    assert (bare.name, bare.rows, bare.has_references) == ("a, prompts alone (unseen)", rows[1:], False)
    (kept,) = split_by_reference([Group("a", "unseen", "keep", "chat", rows)])
    assert kept.rows == rows


def test_no_source_is_called_as_the_figures_over_several_groups_are():
    names = [free_name(spec, set()) for spec in ("all.jsonl", "data/worst.csv", "a.csv")]
    assert names == ["all (file)", "worst (file)", "a"]


def test_answers_that_a_label_sorted_as_harmful_are_no_references():
    assert Group("a", "", "forget", "chat", [Row("p", "r")]).has_references
    assert not Group("a", "", "forget", "chat", [Row("p", "r", labelled=True), Row("q")]).has_references


def test_a_registered_measure_is_in_line_and_figure(monkeypatch):
    shout = Measure(name="shout", title="shout", meaning="In capitals.", better={"forget": "lower"},
                    of_answer=lambda answer: answer.text.isupper())  # fmt: skip
    same = Measure(name="same", title="same", meaning="Both alike.", better={"forget": ""},
                   of_line=lambda line: line["before"]["answer"] == line["after"]["answer"])  # fmt: skip
    monkeypatch.setattr(judging, "ANSWER_MEASURES", (*ANSWER_MEASURES, shout))
    monkeypatch.setattr(aggregate, "ANSWER_MEASURES", (*ANSWER_MEASURES, shout))
    monkeypatch.setattr(aggregate, "PAIR_MEASURES", (same,))
    lines = judged("forget", panel_of(WordJudge()), ["about p"] * 3, ["about p", "about p", ""])
    found = figures_of(lines, "forget")
    assert lines[0]["after"]["shout"] is False and found["after"]["shout"].value == 0.0
    assert found["pair"]["same"].value == pytest.approx(2 / 3)


def test_both_sides_are_pooled_over_the_groups_that_count():
    lines, facts = [], []
    for name, side, counts in (("a (unseen)", "forget", True), ("a (trained)", "forget", True), ("k", "keep", True),
                               ("published prompt", "forget", False)):  # fmt: skip
        for line in judged(side, panel_of(WordJudge()), ["about p"] * 3, ["about p"] * 3):
            lines.append({**line, "group": name, "counts": counts})
        facts.append({"name": name, "side": side, "counts": counts})
    pooled = pooled_entries(lines, facts)
    assert pooled["forget"]["groups"] == ["a (unseen)"] and pooled["forget"]["n"] == 3
    assert pooled["keep"]["groups"] == ["k"]
    assert pooled_entries([], [])["keep"] is None


def test_every_measure_stands_in_the_glossary():
    glossary = (Path(__file__).parents[2] / "docs/fields.md").read_text(encoding="utf-8")
    assert not [measure.name for measure in MEASURES if f"| `{measure.name}` | {measure.meaning}" not in glossary]


def test_a_judge_that_is_not_among_the_judge_models_is_refused():
    with pytest.raises(UsageError, match=r"--judge guard: is not among --judge_model \(none is named\)"):
        refuse_unknown_judge(SimpleNamespace(judge="guard", judge_model=[]))
