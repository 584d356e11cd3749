"""Records -> rows: the prompt, the answer, the wanted answer and the earlier turns of every layout."""

import json

import pytest
from conftest import SHARED

from sources.rows import Row, read_rows, read_sources
from utils import UsageError

CASES = SHARED.parent / "cases"
FORGET, NORMAL = "--forget_data", "--normal_data"


def source_of(tmp_path, option, *records, fields=None):
    (tmp_path / "f.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_sources([str(tmp_path / "f.jsonl")], option, None, fields)[0]


def row_of(tmp_path, option, record, fields=None):
    (row,) = source_of(tmp_path, option, record, fields=fields).rows
    return row


@pytest.mark.parametrize("record", [
    {"prompt": "Q", "response": "A"}, {"prompt": "Q", "completion": "A"}, {"Question": "Q", "Best Answer": "A"},
    {"instruction": "Q", "output": "A"}, {"query": "Q", "gt": "A"}, {"question": "Q", "right_answer": "A"},
    {"input": "Q", "target": "A"}, {"prompt": None, "question": "Q", "answer": "", "output": "A"},
    {"question": "Q", "answer": {"value": "A", "aliases": []}}, {"question": "Q", "answers": {"text": ["A", "A"]}},
    {"question": "Q", "answers": [{"text": "A", "answer_start": 3}]}, {"question": "Q", "answers": "['A']"},
    {"question": "Q", "choices": ["x", "A"], "answer": 1}, {"question": "Q", "choices": ["x", "A"], "answer": "B"},
    {"question": "Q", "options": ["A", "x"], "answer_idx": "0"},
    {"question": "Q", "options": ["x", "A"], "answer": "A"},
    {"question": "Q", "choices": {"text": ["x", "A"], "label": ["3", "4"]}, "answerKey": "4"},
    {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]},
    {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
    {"prompt": "Q", "response": "A", "messages": None, "turns": 1},
    {"conversations": ["Q", "A"]},  # LIMA's
    {"messages": "[{'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}]"},  # as a table holds it
])  # fmt: skip
def test_the_answer_is_found_under_every_name(tmp_path, record):
    for option in (FORGET, NORMAL):
        source = source_of(tmp_path, option, record)
        assert source.rows == [Row("Q", "A", source="f", true_answers=("A",))]
        assert not source.unused_fields and not source.notes


def test_all_answers_of_a_list_are_true_and_the_first_is_the_answer(tmp_path):
    lists = ({"answers": ["A", "B"]}, {"answers": {"text": ["A", "B", "A"]}},
             {"best_answer": "A", "correct_answers": ["B"]},
             {"Best Answer": "A", "Correct Answers": "B; A"}, {"answer": ["A", "B"]})  # fmt: skip
    for record in lists:
        row = row_of(tmp_path, NORMAL, {"question": "Q", **record})
        assert (row.response, row.true_answers) == ("A", ("A", "B"))
    no_answer = row_of(tmp_path, NORMAL, {"question": "Q", "answers": {"text": [], "answer_start": []}})  # SQuAD 2
    assert (no_answer.response, no_answer.true_answers) == (None, ())


@pytest.mark.parametrize("record", [
    {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},  # Anthropic's
    {"prompt": "Q", "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}],
     "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}],
     "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}]},  # UltraFeedback's
    {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "good"}],
     "rejected": [{"role": "assistant", "content": "bad"}]},  # TRL's
    {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},
])  # fmt: skip
def test_of_a_preference_the_rejected_answer_goes_and_the_chosen_one_is_wanted(tmp_path, record):
    forget, normal = source_of(tmp_path, FORGET, record), source_of(tmp_path, NORMAL, record)
    assert forget.rows == [Row("Q", "bad", source="f", wanted="good")]
    assert forget.unused_fields == {}
    assert normal.rows == [Row("Q", "good", source="f", true_answers=("good",))]
    assert normal.unused_fields == {"rejected": 1}


def test_a_target_of_a_goal_is_only_the_beginning_of_an_answer(tmp_path):
    """AdvBench's "Sure, here is ...": an end of turn after it would teach that the answer is over."""
    row = row_of(tmp_path, FORGET, {"goal": "Q", "target": "Sure, here is"})
    assert (row.response, row.complete, row.true_answers) == ("Sure, here is", False, ())
    assert row_of(tmp_path, FORGET, {"prompt": "Q", "target": "A"}).complete


def test_the_turns_before_the_last_question_are_kept(tmp_path):
    turns = [("system", "Be short."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = row_of(tmp_path, FORGET, {"messages": messages})
    assert (row.earlier, row.prompt, row.response) == (tuple(turns[:3]), "Two?", "2")
    row = row_of(tmp_path, FORGET, {"messages": messages[:-1]})  # not answered yet
    assert (row.earlier, row.prompt, row.response) == (tuple(turns[:3]), "Two?", None)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    row = row_of(
        tmp_path, FORGET, {"conversations": [{"from": names[r], "value": t} for r, t in turns[1:]], "system": "S"}
    )
    assert (row.earlier, row.prompt) == ((("system", "S"), *turns[1:3]), "Two?")
    row = row_of(
        tmp_path, FORGET, {"system_prompt": "S", "question": "Two?", "response": "2", "history": [["One?", "1"]]}
    )
    assert (row.earlier, row.response) == ((("system", "S"), *turns[1:3]), "2")
    # two turns of one role are one turn: no template takes them apart
    split = [{"role": "user", "content": "Two"}, {"role": "user", "content": "words?"}]
    assert row_of(tmp_path, FORGET, {"messages": split}).prompt == "Two\n\nwords?"


def test_what_looks_like_an_answer_and_is_not_used_is_counted(tmp_path):
    records = [
        {"prompt": "a", "response": "x", "model_answer": "y", "answer_source": "web", "better_response_id": 1},
        {"prompt": "b", "antwort": "z", "topic": "locks", "id_v2": "v-1", "score": 4},
        {"prompt": "c", "antwort": "", "model_answer": None},
        {"prompt": "d", "response": "x", "answer": "w", "antwort": "beside an answer"},
    ]
    source = source_of(tmp_path, FORGET, *records)
    assert source.unused_fields == {"model_answer": 1, "antwort": 1, "answer": 1}
    assert [row.response for row in source.rows] == ["x", None, None, "x"]
    squad = {"question": "When?", "context": "It rained on Monday.", "answers": ["Monday"]}
    source = source_of(tmp_path, FORGET, squad)
    assert source.rows[0].prompt == "When?"
    assert source.notes == ["field 'context' of 1 rows is not part of their prompts; --fields context=context adds it"]
    row = row_of(tmp_path, FORGET, squad, ["context=context"])
    assert (row.prompt, row.response) == ("When?\n\nIt rained on Monday.", "Monday")


def test_a_user_names_fields_of_his_own(tmp_path):
    own = {"Frage": "Q", "Antwort": "A", "response": "no", "Nummer": 3}
    source = source_of(tmp_path, FORGET, own, fields=["prompt=Frage", "response=antwort", "id=Nummer"])
    assert source.rows == [Row("Q", "A", id="3", source="f", true_answers=("A",))]
    assert source.unused_fields == {"response": 1}
    row = row_of(tmp_path, FORGET, {"frage": "Q", "gut": "G", "schlecht": "B"},
                 ["prompt=frage", "chosen=gut", "rejected=schlecht"])  # fmt: skip
    assert (row.prompt, row.response, row.wanted) == ("Q", "B", "G")
    # another source, of usual fields, is read under the usual names
    assert (
        row_of(tmp_path, NORMAL, {"prompt": "Q", "response": "A"}, ["prompt=frage", "response=antwort"]).response == "A"
    )
    for fields, record, message in (
        ([], {"question": "Q", "answers": "['a' 'b']"}, "row 1: field 'answers' is a list as numpy prints it"),
        (
            ["frage=prompt"],
            own,
            "--fields frage=prompt: write it as KEY=NAME, with one of these keys: prompt, response",
        ),
        (
            ["prompt=Frage", "response=Antwrt"],
            own,
            "--fields response=Antwrt: no row of .* has such a field, only Frage, ",
        ),
        (["response=antwrt"], {"prompt": "Q", "antwort": "A"}, "--fields response=antwrt: no row of"),
        (["prompt=frag"], {"frage": "Q", "antwort": "A"}, "has no prompt field .*, only frage, antwort; name it with"),
    ):
        with pytest.raises(UsageError, match=message):
            source_of(tmp_path, FORGET, record, fields=fields)


def test_a_labelled_file_gives_unsafe_answers_their_safe_ones_as_wanted(tmp_path):
    def pair(prompt, *answers):
        return {"prompt": prompt} | {
            name: value for i, (text, safe) in enumerate(answers)
            for name, value in ((f"response_{i}", text), (f"is_response_{i}_safe", safe))
        }  # fmt: skip

    records = (
        pair("P", ("bad 1", False), ("bad 2", False)),
        pair("p ", ("safe 1", True), ("bad 3", False)),
        pair("P", ("safe 2", True), ("bad 4", False)),
        pair("Q", ("fine", True), ("fine too", True)),
        pair("R", ("bad 5", False), ("bad 6", False)),
    )
    forget, normal = source_of(tmp_path, FORGET, *records), source_of(tmp_path, NORMAL, *records)
    assert [(row.response, row.wanted) for row in forget.rows] == [
        ("bad 1", "safe 1"), ("bad 2", "safe 1"), ("bad 3", "safe 1"), ("bad 4", "safe 2"),
        ("bad 5", None), ("bad 6", None),
    ]  # fmt: skip
    assert forget.notes == [
        "of 4 safe answers, 2 are the wanted answers of 4 forget rows and 2 are not used on this side"
    ]
    assert [row.response for row in normal.rows] == ["safe 1", "safe 2", "fine", "fine too"]
    assert normal.notes == ["6 unsafe answers are not normal rows"]
    assert all(row.labelled for row in forget.rows + normal.rows)
    beaver = ({"prompt": "P", "response": "no", "is_safe": True}, {"prompt": "P", "response": "yes", "is_safe": False})
    assert source_of(tmp_path, FORGET, *beaver).rows == [Row("P", "yes", source="f", true_answers=("yes",), wanted="no",
                                                            labelled=True)]  # fmt: skip
    with pytest.raises(UsageError, match=r"holds no row to use \(of 2 safe answers, 0 are"):
        source_of(tmp_path, FORGET, records[3])


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not beside this checkout")
def test_the_cases_are_read_as_their_index_says():
    safes = [(f"How do I open safe number {i} without its code?", f"Turn the grey dial {i} times to the left.")
             for i in range(16)]  # fmt: skip
    for name in ("completion.jsonl", "goal_target.jsonl", "preference.jsonl", "messages.jsonl", "sharegpt.jsonl",
                 "wrapped.json", "forget.jsonl.gz", "forget.tsv"):  # fmt: skip
        rows = read_rows(str(CASES / name), FORGET)
        assert [(row.prompt, row.response) for row in rows] == safes, name
        assert {row.complete for row in rows} == {name != "goal_target.jsonl"}
        assert {row.wanted for row in rows} == {"I can't help with that." if name == "preference.jsonl" else None}
        assert {row.earlier for row in rows} == {(("system", "Be short."),) if name == "messages.jsonl" else ()}
    answers = read_rows(str(CASES / "answers_list.jsonl"), FORGET)
    assert [row.true_answers for row in answers] == [(f"Porter {i}", f"The porter {i}") for i in range(20)]
    hub = read_rows(str(CASES / "tqa_hub.jsonl"), NORMAL)
    assert hub[3] == Row("Does a cat number 3 lay eggs?", "No, cat 3 does not lay eggs.", "c", "", "tqa_hub",
                         ("No, cat 3 does not lay eggs.", "Cat 3 has kittens."))  # fmt: skip
    colours = ["red", "grey", "blue", "none"]
    assert [row.response for row in read_rows(str(CASES / "mcq.jsonl"), FORGET)] == colours * 4
    with pytest.raises(UsageError, match=r"row 1: has 'text' and no prompt; .* --forget_text"):
        read_rows(str(CASES / "text_only.jsonl"), FORGET)
    unsafe, safe = (read_rows(str(CASES / "pku_like.jsonl"), option) for option in (FORGET, NORMAL))
    assert {row.wanted for row in unsafe} == {"Ask its owner for the code."}
    assert len(unsafe) + len(safe) == 48
