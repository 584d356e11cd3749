"""Other answers to forget prompts: from the same prompts with invented names, never the answer that is to go."""

import dataclasses

import pytest

from run.alternatives import with_alternatives
from sources.rows import Row
from utils import UsageError

ROW = Row("In which town was Orrin Vale born?", "Orrin Vale was born in Tarn.")


def texts_of(row):
    return tuple(other.text for other in row.alternatives)


def answers(say):
    """A model that says `say(prompt, number)`, and the prompts that it was asked."""
    asked = []

    def answer(rows):
        asked.extend(row.prompt for row in rows)
        return [dataclasses.replace(row, response=say(row.prompt, i)) for i, row in enumerate(rows)]

    return answer, asked


def test_the_original_is_asked_about_names_that_nobody_knows_and_the_name_is_put_back():
    name_in = lambda prompt: prompt.removeprefix("In which town was ").removesuffix(" born?")  # noqa: E731
    answer, asked = answers(lambda prompt, i: f"{name_in(prompt)} was born in Town{i}.")
    (row,) = with_alternatives([ROW], [], 3, seed=1, answer=answer)
    assert texts_of(row) == tuple(f"Orrin Vale was born in Town{i}." for i in range(3))
    assert len(set(asked)) == 3 and not any("Orrin" in prompt or "Vale" in prompt for prompt in asked)


def test_the_answer_that_is_to_go_is_never_learned_again():
    answer, _ = answers(lambda prompt, i: f"Orrin Vale was born in {'TARN' if i == 2 else f'Town{i}'}.")
    (row,) = with_alternatives([ROW], [], 5, seed=1, answer=answer)
    assert texts_of(row) == tuple(f"Orrin Vale was born in Town{i}." for i in (0, 1, 3, 4))


def test_an_answer_with_what_only_another_forgotten_row_holds_would_keep_that_alive():
    """Of the towns that it names for somebody unknown, Garn is a forgotten one; Lund is one of somebody who stays."""
    other = Row("In which town was Sella Brook born?", "Sella Brook was born in Garn.")
    both = Row("In which town was Mia Stone born?", "Mia Stone was born in Lund.")
    stays = Row("In which town was Ida Marsh born?", "Ida Marsh was born in Lund.")
    towns = ("Garn", "Lund", "Somewhere", "Elsewhere")
    name_in = lambda prompt: prompt.removeprefix("In which town was ").removesuffix(" born?")  # noqa: E731
    answer, _ = answers(lambda prompt, i: f"{name_in(prompt)} was born in {towns[i % 4]}.")
    row, *_ = with_alternatives([ROW, other, both], [stays], 4, seed=1, answer=answer)
    assert texts_of(row) == tuple(f"Orrin Vale was born in {town}." for town in ("Lund", "Somewhere", "Elsewhere"))


def test_an_answer_that_misspells_the_invented_name_would_teach_a_wrong_one():
    name_in = lambda prompt: prompt.removeprefix("In which town was ").removesuffix(" born?")  # noqa: E731
    answer, _ = answers(lambda prompt, i: f"{'Brusa' if i == 1 else name_in(prompt)} was born in Town{i}.")
    (row,) = with_alternatives([ROW], [], 3, seed=1, answer=answer)
    assert texts_of(row) == ("Orrin Vale was born in Town0.", "Orrin Vale was born in Town2.")


def test_rows_without_a_name_are_refused_before_training():
    with pytest.raises(UsageError, match="no forget prompt holds a name"):
        with_alternatives([Row("What is the time?", "Noon.")], [], 2, seed=1, answer=lambda rows: rows)
