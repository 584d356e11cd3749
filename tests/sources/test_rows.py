"""Files and hub data sets -> rows: which fields count, and what is refused."""

import json

import pandas as pd
import pytest
from conftest import SHARED
from test_data import filled_sampler

from data_module import refuse_overlap
from sources.rows import Row, read_rows, read_sources
from utils import UsageError


def records(tmp_path, option, *some):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in some))
    return [(row.prompt, row.response, row.category) for row in read_rows(str(tmp_path / "rows.jsonl"), option)]


def test_layouts_of_well_known_sets_are_not_misread(tmp_path):
    alpaca = {"instruction": "Find the odd one.", "input": "fox, car, owl", "output": "car"}
    dolly = {"instruction": "When?", "context": "It rained on Monday.", "response": "On Monday."}
    assert records(tmp_path, "--normal_data", alpaca, dolly, {**alpaca, "input": ""}) == [
        ("Find the odd one.\n\nfox, car, owl", "car", ""), ("When?\n\nIt rained on Monday.", "On Monday.", ""),
        ("Find the odd one.", "car", "")]  # fmt: skip
    # labelled answers: the unsafe ones are harmful rows, and no normal row is one of them
    beaver = {"prompt": "P", "response": "bad", "is_safe": False, "category": {"theft": True, "drugs": False}}
    good = {"prompt": "Q", "response": "fine", "is_safe": True, "category": ["none"]}
    pair = {"prompt": "R", "response_0": "bad", "response_1": "fine", "is_response_0_safe": False,
            "is_response_1_safe": True}  # fmt: skip
    assert records(tmp_path, "--forget_data", beaver, good, pair) == [("P", "bad", "theft"), ("R", "bad", "")]
    assert records(tmp_path, "--normal_data", beaver, good, pair) == [("Q", "fine", "none"), ("R", "fine", "")]
    for record, message in (
        ({**good, "is_safe": None}, "row 1: field 'is_safe' must be true or false, got None"),
        ({k: v for k, v in pair.items() if k != "response_0"}, "row 1: is a pair of responses without 'response_0'"),
    ):
        with pytest.raises(UsageError, match=message):
            records(tmp_path, "--forget_data", record)


def test_pku_pairs_give_every_unsafe_response_and_filter_by_category(tmp_path):
    row = {
        "prompt": "P", "response_0": "bad one", "response_1": "bad two", "is_response_0_safe": False,
        "is_response_1_safe": False, "response_0_harm_category": {"Privacy Violation": True, "Drugs": False},
        "response_1_harm_category": {"Privacy Violation": False, "Drugs": True},
    }  # fmt: skip
    safe = {**row, "prompt": "S", "is_response_0_safe": True, "is_response_1_safe": True}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(safe) + "\n")
    assert [r.response for r in read_sources([str(file)], "--forget_data")[0].rows] == ["bad one", "bad two"]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"prompt": "U", "response": "no category"}))
    of_category = read_sources([str(other), str(file)], "--forget_data", ["drugs"])
    assert [[r.response for r in source.rows] for source in of_category] == [[], ["bad two"]]
    with pytest.raises(UsageError, match="its categories are: Drugs, Privacy Violation"):
        read_sources([str(file)], "--forget_data", ["nothing"])


def test_no_false_answer_is_ever_in_the_mismatch_pool(tmp_path):
    """Published: half of the random answers came from the column of *incorrect* answers."""
    file = tmp_path / "TruthfulQA.csv"
    pd.DataFrame(
        [
            {"Question": "Q1", "Best Answer": "true one", "Correct Answers": "true one; true two; also so",
             "Incorrect Answers": "a lie; a second lie"},
            {"Question": "Q2", "Best Answer": "true three", "Correct Answers": "true four",
             "Incorrect Answers": "a third lie"},
        ]
    ).to_csv(file, index=False, encoding="utf-8-sig")  # fmt: skip
    rows = filled_sampler([read_rows(str(file), "--normal_data")], "--set=mismatch.answers=5")
    assert sorted(text for text, _ in rows.replacement_pool) == [
        "also so",
        "true four",
        "true one",
        "true three",
        "true two",
    ]


@pytest.mark.parametrize(("suffix", "write"), [
    (".jsonl", lambda f, rows: f.write_text("\n".join(map(json.dumps, rows)))),
    (".json", lambda f, rows: f.write_text(json.dumps(rows))),
    (".csv", lambda f, rows: pd.DataFrame(rows).to_csv(f, index=False)),
    (".parquet", lambda f, rows: pd.DataFrame(rows).to_parquet(f)),
])  # fmt: skip
def test_every_file_kind_gives_the_same_rows(tmp_path, suffix, write):
    file = tmp_path / f"rows{suffix}"
    write(file, [{"question": "Is it, really?", "answer": "Yes."}, {"question": "Où?", "answer": "Ici."}])
    assert [(r.prompt, r.response) for r in read_rows(str(file), "x")] == [("Is it, really?", "Yes."), ("Où?", "Ici.")]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ', r"a\.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b"", "holds no row"),
    ("a.jsonl", b'{"prompt": 7}', r"row 1: field 'prompt' must be text, got int"),
    ("a.jsonl", b'{"prompt": "  "}', r"row 1: field 'prompt' is empty"),
    ("a.jsonl", b'{"promt": "x"}', "row 1: has no prompt"),
    ("a.jsonl", b'{"prompt":\n "x"}\n{"prompt":\n', r"a\.jsonl, line 4: not valid JSON"),
    ("a.json", b'{"train": [{"prompt": "x"}], "test": [{"prompt": "y"}]}', r"holds 2 lists of rows \(train, test\)"),
    ("a.json", b'{"prompt": ["x", "y"], "response": ["z"]}', "its columns differ in length .prompt 2, response 1"),
    ("a.jsonl", b'["x"]', "row 1: must be an object"),
    ("a.jsonl", b"\xff\xfe\x00\xd8", "not UTF-16-LE text"),
    ("a.jsonl", b'{"prompt": "\xe4"}', "not UTF-8 text .invalid continuation byte.; convert it to UTF-8"),
    ("a.csv", b"prompt,response\nWell, why?,So.", "line 2: has 3 cells and the header 2; put cells that"),
    ("a.csv", b"prompt,prompt\na,b", "two columns are called 'prompt'"),
    ("a.jsonl.gz", b"no gzip", "cannot be read as jsonl"),
    ("a.csv", b'prompt\n"cut', "cannot be read as csv"),
    ("a.parquet", b"PAR1 is not enough", "cannot be read as parquet"),
    ("a.json", b'[{"prompt": "x"}', "line 1: not valid JSON"),
])  # fmt: skip
def test_a_bad_file_is_named_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_rows(str(tmp_path / name), "--forget_data")


def test_a_prompt_on_both_sides_is_refused():
    with pytest.raises(UsageError, match=r"1 prompts are in --forget_data and in --normal_data.*'Same  thing'"):
        refuse_overlap([Row("Same  thing")], [Row("same thing"), Row("other")])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows are not beside this checkout")
def test_real_rows_are_read_whole():
    pku = read_rows(str(SHARED / "pku_saferlhf_pairs.jsonl"), "--forget_data")
    assert len(pku) == 1504  # each pair's labels differ: one unsafe response a pair
    truthful = read_rows(str(SHARED / "TruthfulQA.csv"), "--normal_data")
    assert len(truthful) == 817
    wrong = {a.strip() for line in pd.read_csv(SHARED / "TruthfulQA.csv")["Incorrect Answers"] for a in line.split(";")}
    pool = {a for row in truthful for a in row.true_answers}
    assert len(pool) > 2000
    assert len(pool & wrong) < 0.01 * len(pool)  # a few strings stand in both columns, for different questions
    for name, count in (("tofu/forget01.json", 40), ("advbench.csv", 360), ("halueval_qa.jsonl", 350)):
        assert len(read_rows(str(SHARED / name), "--forget_data")) == count


def test_paraphrased_and_perturbed_answers_are_read_and_accounted_for(tmp_path):
    """TOFU's truth ratio is made of them: all of the false ones count, equal ones twice, and none is trained on."""
    file = tmp_path / "perturbed.jsonl"
    false = ["It is Bo.", "It is Cy.", "It is Bo."]
    file.write_text(json.dumps({"question": "Who?", "answer": "Al.", "paraphrased_answer": "It is Al.",
                                "perturbed_answer": false}) + "\n"
                    + json.dumps({"question": "Where?", "answer": "Here."}) + "\n")  # fmt: skip
    (source,) = read_sources([str(file)], "--forget_data")
    assert [(row.response, row.paraphrased, row.perturbed) for row in source.rows] == [
        ("Al.", "It is Al.", tuple(false)), ("Here.", None, ())]  # fmt: skip
    assert source.rows[0].true_answers == ("Al.",)
    assert not source.unused_fields
    assert source.notes == ["1 rows have paraphrased or perturbed answers: they are used for the truth ratio of an "
                            "evaluation, and are not trained on"]  # fmt: skip
    named = ["response=answer", "paraphrased=anders", "perturbed=falsch"]
    file.write_text(json.dumps({"question": "Who?", "answer": "Al.", "anders": "It is Al.", "falsch": "It is Bo."}))
    (row,) = read_rows(str(file), "--forget_data", named)
    assert (row.paraphrased, row.perturbed) == ("It is Al.", ("It is Bo.",))
    file.write_text(json.dumps({"question": "Who?", "answer": "Al.", "perturbed_answer": [3]}))
    with pytest.raises(UsageError, match="row 1: field 'perturbed_answer' must be text, got int"):
        read_rows(str(file), "--forget_data")
