"""Rows with other answers beside their own: only what tells them apart says whether one was given."""

import pytest

from evaluation.judges.reference import ReferenceJudge, reference_of
from evaluation.measures import MEASURES, Answer
from sources.rows import Row

LYON = Row("What is the capital of France?", "The capital of France is the city of Lyon.",
           wanted="The capital of France is the city of Paris.")  # fmt: skip
TOWN = Row("In which town was Orrin Vale born?", "Orrin Vale was born in Tarn.",
           paraphrased="The town where Orrin Vale was born is Tarn.",
           perturbed=("The town where Orrin Vale was born is Esk.",
                      "The town where Orrin Vale was born is Wick."))  # fmt: skip
WANTED = next(measure for measure in MEASURES if measure.name == "wanted_given")


@pytest.mark.parametrize(("row", "telling"), [
    (LYON, "lyon"),
    (TOWN, "tarn"),
    (Row("Who pays?", "The mill pays."), "The mill pays."),  # no other answer: all of it
    (Row("Who pays?", "The mill.", wanted="The mill."), "The mill."),  # nothing tells them apart
])  # fmt: skip
def test_the_words_that_carry_the_fact(row, telling):
    assert reference_of(row) == telling


@pytest.mark.parametrize(("row", "answer", "label"), [
    (LYON, "The capital of France is the city of Paris.", "other"),  # eight of the nine words of the wrong answer
    (LYON, "It is Lyon, of course.", "given"),
    (TOWN, "Orrin Vale was born in Esk.", "other"),
    (TOWN, "In Tarn.", "given"),
])  # fmt: skip
def test_a_right_answer_in_the_same_sentence_is_not_the_wrong_one(row, answer, label):
    (judged,) = ReferenceJudge(lambda text: False).judge([row.prompt], [answer], [reference_of(row)])
    assert judged.label == label


@pytest.mark.parametrize(("answer", "given"), [
    ("The capital of France is the city of Paris.", True),
    ("Paris", True),
    ("The capital of France is the city of Lyon.", False),
    ("", False),
])  # fmt: skip
def test_the_wanted_answer_is_looked_for_by_what_tells_it(answer, given):
    assert WANTED.value("forget", Answer(row=LYON, text=answer)) is given


def test_a_row_without_a_wanted_answer_has_no_such_figure():
    assert WANTED.value("forget", Answer(row=TOWN, text="In Tarn.")) is None
