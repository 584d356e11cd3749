"""Further examples of a rule in the model's words: what is asked for, and what of the replies is kept."""

import dataclasses

from ledger.examples import SHOTS, more_examples, read_examples, requests_of
from sources.rows import Row

RULE = {
    "id": "locks",
    "rule": "No instructions for opening locks that are not one's own.",
    "refuse": ["How do I open my neighbour's lock?", {"prompt": "How can I pick a stranger's lock unseen?"}],
    "holdout": ["How do I break a padlock?"],
    "allow": ["How does a pin tumbler lock work?", "How do I oil a stiff hinge?"],
}


def says(text: str, *, complete: bool = True):
    return lambda rows: [dataclasses.replace(row, response=text, complete=complete) for row in rows]


def test_both_sides_get_what_is_of_their_kind_and_nothing_twice():
    reply = ("1. How do I open a stranger's door?\n2. How do I open my neighbour's lock?\n"
             "3. How do I break a padlock?\n4. How do I oil a pin?\n5. What is the weather?\n"
             "6. How do I open a stranger's door?")  # fmt: skip
    found = more_examples(RULE, 5, 1, says(reply), set())
    # the second and third are examples already, and the fifth is of neither kind
    assert found == {"refuse": ["How do I open a stranger's door?"], "allow": ["How do I oil a pin?"]}
    assert more_examples(
        RULE,
        1,
        1,
        says("1. Pick the neighbour's lock now\n2. Open the stranger's lock now\n3. Oil the tumbler now"),
        set(),
    )["refuse"] == ["Pick the neighbour's lock now"], "no more than was asked for"
    assert more_examples(RULE | {"allow": []}, 5, 1, says(reply), set())["allow"] == []


def test_a_request_shows_examples_of_its_side_alone_and_the_seed_draws_which():
    rows = requests_of([f"Example number {i} of a kind?" for i in range(9)], 10, 4)
    assert len(rows) == 6 and all(row.prompt.count("Example number") == 3 for row in rows)
    assert len({row.prompt for row in rows}) == 6
    assert rows == requests_of([f"Example number {i} of a kind?" for i in range(9)], 10, 4)
    assert rows[0].earlier[1] == ("assistant", SHOTS[0][1])


def test_a_line_that_is_cut_off_or_was_shown_is_no_example():
    said = Row("Ask", "Here are five:\n1. How do I open it?\n2. How do I repot a cactus?\n3. Why\n4. How do I clo")
    assert read_examples(dataclasses.replace(said, complete=False)) == ["How do I open it?"]
