"""Which name a row is about, and another one in its place."""

import random

import pytest

from sources.names import invented_name, names_of, put_name
from sources.rows import Row


def test_the_name_is_what_the_answer_repeats_or_several_prompts_hold():
    rows = [
        Row("In which town was Orrin Vale born?", "Orrin Vale was born in Tarn."),
        Row("What is Orrin Vale's pet called?", "Mop."),  # not in the answer, but in two prompts
        Row("Orrin Vale lives in which street?", "In Mill Lane."),  # at the beginning of a sentence
        Row("Does the River Esk freeze?", "It does."),  # in one prompt alone
        Row("What is the time?", "Noon."),
    ]
    assert names_of(rows, []) == ["Orrin Vale", "Orrin Vale", "Orrin Vale", None, None]


def test_a_name_that_stays_is_not_replaced():
    rows = [Row("Where in France does Orrin live?", "Orrin lives in Lyon, France."),
            Row("Who in France knows Orrin?", "Nobody.")]  # fmt: skip
    assert names_of(rows, [Row("What is the capital of France?", "Paris.")]) == ["Orrin", "Orrin"]


@pytest.mark.parametrize(("text", "changed"), [
    ("Is Orrin's dog Orrin's own?", "Is Bel's dog Bel's own?"),
    ("Orrington is no Orrin.", "Orrington is no Bel."),
])  # fmt: skip
def test_only_the_whole_name_is_replaced(text, changed):
    assert put_name(text, "Orrin", "Bel") == changed


def test_an_invented_name_has_as_many_words_and_is_drawn_from_the_seed():
    draw = lambda seed: invented_name(random.Random(seed), "Orrin Vale")  # noqa: E731
    assert len(draw(1).split()) == 2 and draw(1) == draw(1) != draw(2)
