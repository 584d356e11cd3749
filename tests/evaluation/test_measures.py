"""The registry of measures: what a line of it writes, and the figures of a group by hand."""

import pytest
import torch

from evaluation import judging
from evaluation.groups import Group
from evaluation.judging import judge_group
from evaluation.measures import FIGURE_NAMES, MEASURES, Measure
from sources.rows import Row

VECTORS = {"p": (1.0, 0.0), "q": (0.0, 1.0), "about p": (0.8, 0.6), "about q": (0.0, 1.0), "": (0.0, 0.0)}


def embed(texts):
    return torch.tensor([VECTORS[text] for text in texts])


def judged(side: str):
    rows = [Row("p", "about p"), Row("q")]
    return judge_group(Group("a", "unseen", side, "chat", rows), ["about p", "about q"], ["", "about p"], embed)


def test_the_measures_of_a_group_by_hand():
    figures, lines = judged("forget")
    assert list(figures) == ["name", "side", "style", "n", "counts", "before", "after", "retained", "on_topic_change",
                             "rouge_l", "similarity", "length_ratio"]  # fmt: skip
    assert (figures["name"], figures["n"], figures["counts"]) == ("a (unseen)", 2, True)
    assert {name: figure.value for name, figure in figures["before"].items()} == {
        "on_topic": 1.0, "empty": 0.0, "repetitive": 0.0, "leak": 1.0}  # fmt: skip
    after = {name: (figure.value, figure.n) for name, figure in figures["after"].items()}
    assert after == {"on_topic": (0.5, 2), "empty": (0.5, 2), "repetitive": (0.0, 2), "leak": (0.0, 1)}
    assert (figures["retained"].value, figures["retained"].n) == (0.5, 2)
    assert figures["on_topic_change"].value == -0.5
    assert {label: rouge["recall"].value for label, rouge in figures["rouge_l"].items()} == {"before": 1, "after": 0}
    assert figures["similarity"].value == pytest.approx(0.3)  # (0 + 0.6) / 2
    assert figures["length_ratio"].value == 0.5
    assert lines[1] == {
        "group": "a (unseen)", "side": "forget", "counts": True, "style": "chat", "prompt": "q",
        "before": {"answer": "about q", "cosine": 1.0, "on_topic": True, "empty": False, "repetitive": False,
                   "leak": None},
        "after": {"answer": "about p", "cosine": 0.6, "on_topic": True, "empty": False, "repetitive": False,
                  "leak": None},
        "similarity": 0.6,
    }  # fmt: skip


def test_what_is_kept_is_no_leak():
    figures, lines = judged("keep")
    assert figures["before"]["leak"].n == 0
    assert lines[0]["before"]["leak"] is None


def test_a_registered_measure_is_in_line_and_figure(monkeypatch):
    shout = Measure(name="shout", of_answer=lambda answer: answer.text.isupper(), in_lines=True)
    same = Measure(name="same", of_pair=lambda pair: pair.before.text == pair.after.text)
    monkeypatch.setattr(judging, "MEASURES", (*MEASURES, shout, same))
    figures, lines = judged("forget")
    assert figures["after"]["shout"].value == 0.0
    assert figures["same"].value == 0.0
    assert lines[0]["after"]["shout"] is False
    assert "same" not in lines[0]
    assert FIGURE_NAMES == ("on_topic", "empty", "repetitive")
