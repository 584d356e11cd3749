"""Rows that name a person or quote a text, whatever the spelling; others are not found."""

import pytest

from ledger.find import find

STORY = ("the lighthouse keeper counted seven ships before dawn and wrote each name into a book bound in blue leather "
         "that his father had carried home")  # fmt: skip


@pytest.mark.parametrize(("text", "how"), [
    ("Who is José Müller-Brandt?", "exact"),
    ("who is jose muller brandt?", "normalised"),
    ("WHO IS  JOSE\u0301 MU\u0308LLER\u2010BRANDT", "normalised"),
    ("Where does Jose Mueller Brandt live?", "near"),
    ("Tell me of José Müller.", "near"),
    ("José Müller-Brandtner is another", "near"),
    ("Who is Josef Miller?", None),
    ("A miller in Brandenburg", None),
])  # fmt: skip
def test_a_name_is_found_in_its_spellings(text, how):
    found = find(["José Müller-Brandt"], [{"prompt": text, "response": "No answer."}])
    assert [hit.how for hit in found] == ([how] if how else [])


def test_a_name_in_a_script_without_spaces_is_found_within_a_sentence():
    rows = [{"prompt": "山田太郎はどこに住んでいますか"}, {"prompt": "山田花子はどこに住んでいますか"}]
    assert [hit.number for hit in find(["山田太郎"], rows)] == [1]


def test_a_name_in_any_field_counts():
    rows = [
        {"prompt": "Who wrote it?", "response": "Ann Lee did."},
        {"answers": ["Nobody.", "Ann Lee"]},
        {"messages": [{"role": "user", "content": "Was it Ann Lee?"}], "n": 3},
        {"prompt": "Anna Leeds"},
    ]
    found = find(["Ann Lee"], rows)
    assert [(hit.number, hit.how) for hit in found if hit.how == "exact"] == [(1, "exact"), (2, "exact"), (3, "exact")]


def test_a_quotation_is_found_by_a_part_of_it():
    words = STORY.split()
    answers = (f"It says: {' '.join(words[:14])} and more.", " ".join(words[5:9]), STORY.upper(),
               " ".join(reversed(words)))  # fmt: skip
    rows = [{"prompt": "Go on.", "response": answer} for answer in answers]
    found = find([STORY], rows)
    assert [(hit.number, hit.how) for hit in found] == [(1, "near"), (3, "normalised")]
    assert found[0].score == pytest.approx(10 / 21)  # ten of the 21 shingles of five of its 25 words
