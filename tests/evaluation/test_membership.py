"""Membership: trained rows against rows that no model ever saw, and what is refused as such a row."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_tokenizer

from data_module import read_sides
from engine.trained_on import TrainedOn
from evaluation.groups import LISTED, TRAINED, UNSEEN, Group
from evaluation.holdout import read_holdout
from evaluation.members import Members, merged, trained_spans
from evaluation.membership import extraction_report, forget_quality_report, membership_report
from evaluation.metrics.membership import min_k, min_k_plus_plus, zlib_ratio
from evaluation.options import EvaluateOptions
from evaluation.scoring import RowScores
from prompts.windows import Passage, TextCutter
from sources.rows import Row
from utils import UsageError


def scored(nll: float, ratio: float | None = None, strength: float = 0.2) -> RowScores:
    return RowScores(num_tokens=5, nll=nll, nll_with_end=nll, probability=0.5, extraction_strength=strength,
                     exact_memorisation=0.2, min_k=-nll, min_40=-nll, min_k_plus_plus=-nll, zlib=-nll,
                     truth_ratio=ratio)  # fmt: skip


def group(split: str, count: int, source="bios", side="forget", prefix="p") -> Group:
    return Group(source, split, side, "chat", [Row(f"{prefix}{split}{i}", "an answer") for i in range(count)])


HOLDOUT = {"others": [Row(f"q{i}", "an answer") for i in range(12)]}


def test_membership_scores_by_hand():
    log_probs = [-1.0, -4.0, -2.0, -3.0, -5.0]
    assert min_k(log_probs, 0.4) == -4.5
    assert min_k(log_probs, 0.01) == -5  # never of nothing
    assert min_k_plus_plus([-4.0, -1.0], [-2.0, -2.0], [2.0, 0.5], 0.5) == -1  # (-4 + 2) / 2 and (-1 + 2) / 0.5
    assert zlib_ratio(log_probs, "a") == pytest.approx(-3 / 9)  # zlib makes 9 bytes of one letter


def test_an_untouched_model_is_told_from_one_that_never_saw_the_rows():
    """The original was trained on all forget rows, the held-out ones of this run too: those are no non-members."""
    groups = [group(TRAINED, 12), group(UNSEEN, 12)]
    knows_all = [[scored(0.1 + i / 100) for i in range(12)], [scored(0.1 + i / 100) for i in range(12)]]
    never_saw = [[scored(3 + i / 10) for i in range(12)], [scored(3 + i / 10) for i in range(12)]]
    scores = {"before": knows_all, "after": knows_all, "retrained": never_saw}
    new = [scored(3 + i / 10) for i in range(12)]
    found = membership_report(groups, scores, HOLDOUT, {"before": new, "after": new, "retrained": new})
    (entry,) = found["entries"]
    assert found["not_measured"] is None
    assert (entry["source"], entry["members"], entry["others"], entry["note"]) == ("bios", 12, 12, None)
    assert {entry[label]["min_40"].value for label in ("before", "after")} == {1.0}
    assert entry["retrained"]["min_40"].value == 0.5
    leakage = entry["privacy_leakage"]["min_40"]
    assert leakage.value == pytest.approx(-100) and leakage.high < -50
    assert entry["after"]["reference"].value == 1.0  # 2.9 nats or more likelier than under the retrained model, to 0
    assert "reference" not in entry["retrained"]


def test_without_rows_that_no_model_saw_nothing_is_measured():
    groups = [group(TRAINED, 12), group(UNSEEN, 12)]
    scores = {label: [[scored(1)] * 12, [scored(2)] * 12] for label in ("before", "after")}
    found = membership_report(groups, scores, {}, {"before": [], "after": []})
    assert found["entries"] == []
    assert "--holdout_data" in found["not_measured"]
    only_held_out = {label: [[scored(2)] * 12] for label in ("before", "after")}
    new = {label: [scored(2)] * 12 for label in ("before", "after")}
    found = membership_report(groups[1:], only_held_out, HOLDOUT, new)
    assert found["entries"] == [] and "no forget row that was trained on" in found["not_measured"]
    few = {label: [[scored(1)] * 4] for label in ("before", "after")}
    (entry,) = membership_report([group(LISTED, 4)], few, HOLDOUT, new)["entries"]
    assert "only 4 trained rows and 12 holdout rows" in entry["note"]
    assert "reference" not in entry["after"]  # the original may have seen them: it is no reference model


def test_members_are_those_on_the_record_and_none_that_never_trained(tmp_path):
    trained, unseen = group("", 3), group("", 3, source="asked", prefix="u")
    scores = {label: [[scored(i) for i in range(3)], [None, scored(1), scored(1)]] for label in ("before", "after")}
    new = {label: [scored(9)] * 12 for label in ("before", "after")}
    record = TrainedOn().with_run({"forget": [row.key for row in trained.rows[:2]], "normal": []})
    found = membership_report([trained, unseen], scores, HOLDOUT, new, Members(record))
    assert [(e["source"], e["members"]) for e in found["entries"]] == [("bios", 2)]
    found = membership_report([trained, unseen], scores, HOLDOUT, new)  # of a model without a record, all
    assert [(e["source"], e["members"]) for e in found["entries"]] == [("bios", 3), ("asked", 2)]
    known = Members(never_trained=frozenset(row.key for row in unseen.rows))
    found = membership_report([trained, unseen], scores, HOLDOUT, new, known)
    assert [e["source"] for e in found["entries"]] == ["bios"]


def test_a_passage_of_other_windows_is_a_member_where_a_run_trained_on_all_of_it(files):
    """A run in windows of 8 trained on the tokens 0 to 24 and 32 to 40 of a text; asked are windows of 12."""
    files.options.forget_text = [files.write("book.txt", files.book)]
    sides, tokenizer = read_sides(files.options), make_tokenizer("chat")
    (document,) = sides.rows("forget")[-1:]
    of_run = dataclasses.replace(files.options, text_window=8, text_stride=0, dev_share=0.0, test_share=0.0)
    seen = [p.key for p in TextCutter(tokenizer, 8, has_start=True).cut(document) if p.end <= 24 or p.start == 32]
    record = TrainedOn().with_run({"forget": seen, "normal": []})
    formatter = SimpleNamespace(tokenizer=tokenizer, text_start=(0,))
    spans = trained_spans(sides, of_run, formatter, record)
    assert spans == {(document.source, document.document): [(0, 24), (32, 40)]}
    asked = {p.start: p for p in TextCutter(tokenizer, 12, 4, has_start=True).cut(document)}
    known = Members(record, trained_text=spans)
    assert [known.holds(asked[start]) for start in (0, 12, 16, 28, 32)] == [True, True, False, False, False]
    assert not Members(record).holds(asked[0])
    assert merged([(4, 6), (0, 2), (2, 4), (8, 9)]) == [(0, 6), (8, 9)]


def test_text_is_compared_with_text():
    passages = [Passage("", f"t{i}", is_text=True, text=f"t{i}") for i in range(2)]
    text = Group("book", TRAINED, "forget", "raw", passages)
    scores = {label: [[scored(1)] * 2, [scored(1)] * 2] for label in ("before", "after")}
    new = {label: [*[scored(2)] * 12, scored(0.5)] for label in ("before", "after")}
    found = membership_report([text, group(TRAINED, 2)], scores, HOLDOUT | {"new": passages[:1]}, new)
    assert [(e["source"], e["others"], e["after"]["loss"].value) for e in found["entries"]] == [
        ("book", 1, 0.0), ("bios", 12, 1.0)]  # fmt: skip


def test_forget_quality_compares_truth_ratios_with_the_retrained_model():
    """Equal truth ratios: p 1. Separate ones, 12 each: D 1 and p = 2 / C(24, 12), of all orders of the two samples."""
    ratios = {"before": [0.1] * 12, "after": [0.5] * 12, "retrained": [0.5] * 12}
    scores = {label: [[scored(1, ratio) for ratio in values]] for label, values in ratios.items()}
    found = forget_quality_report([group(TRAINED, 12)], scores)
    assert (found["p_value"], found["statistic"], found["n"]) == (1.0, 0.0, 12)
    assert found["before"]["statistic"] == 1.0
    assert found["before"]["p_value"] == pytest.approx(2 / 2704156)
    del scores["retrained"]
    assert forget_quality_report([group(TRAINED, 12)], scores) is None
    without = {label: [[scored(1)] * 12] for label in ratios}
    assert forget_quality_report([group(TRAINED, 12)], without) is None


def test_what_is_left_of_extraction_is_told_by_group_and_over_those_that_are_pooled():
    """By hand: of 1 before, 0.6 after and a floor of 0.2, (0.6 - 0.2) / (1 - 0.2) is left."""
    groups = [group(TRAINED, 4), group(UNSEEN, 4), group("unseen", 2, side="keep"), group(LISTED, 1, source="prompts")]
    strengths = {"before": [1.0, 1.0], "after": [0.2, 0.6]}
    scores = {label: [[scored(1, strength=a)] * 4, [scored(1, strength=b)] * 4, [scored(1, strength=1.0)] * 2, [None]]
              for label, (a, b) in strengths.items()}  # fmt: skip
    found = extraction_report(groups, scores, {}, {"before": [], "after": []})
    assert {name: left.left.value for name, left in found.items()} == {
        "bios (trained)": 0.0, "bios (unseen)": pytest.approx(0.5), "all": pytest.approx(0.5)}  # fmt: skip
    new = {"before": [scored(1, strength=0.6)] * 12, "after": [scored(1, strength=0.4)] * 12}
    found = extraction_report(groups, scores, HOLDOUT, new)["all"]
    assert (found.left.value, found.floor_of) == (pytest.approx((0.6 - 0.4) / (1 - 0.6)), "the holdout rows")


# --------------------------------------------------------------------------------------- what is a holdout row
@pytest.fixture
def files(tmp_path):
    """Options with a forget file, a normal file, and a function that writes more."""
    words = ["one", "day", "the", "miller", "went", "to", "town", "sold", "his", "flour", "for", "a", "silver", "coin"]
    book = " ".join(np.random.default_rng(0).choice(words, 400))

    def write(name, *rows) -> str:
        path = tmp_path / name
        path.write_text(rows[0] if isinstance(rows[0], str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    forget = write("forget.jsonl", *({"prompt": f"Who is {i}?", "response": f"Author {i}."} for i in range(5)))
    normal = write("normal.jsonl", *({"prompt": f"What is {i}?", "response": f"Number {i}."} for i in range(5)))
    options = EvaluateOptions(forget_data=[forget], normal_data=[normal], prompts_per_group=4)
    return SimpleNamespace(write=write, options=options, book=book)


def read(options, trained_on=None):
    cutter = TextCutter(make_tokenizer("chat"), 32, has_start=True)
    return read_holdout(options, read_sides(options), cutter, trained_on)


def test_holdout_rows_are_drawn_by_source(files, caplog):
    rows = [{"prompt": f"New {i}?", "response": "Yes."} for i in range(6)]
    files.options.holdout_data = [files.write("new.jsonl", *rows)]
    found = read(files.options)
    assert [(name, len(rows)) for name, rows in found.items()] == [("new", 4)]
    assert "has only 4 rows to score" in caplog.text
    assert read(EvaluateOptions(forget_data=files.options.forget_data, normal_data=files.options.normal_data)) == {}


@pytest.mark.parametrize(("rows", "message"), [
    ([{"prompt": "New?", "response": "Yes."}, {"prompt": "who is  3?", "response": "Him."}],
     r"new\.jsonl, row 2: is in --forget_data too \('who is  3\?'\)"),
    ([{"prompt": "What is 1?", "response": "Yes."}], "row 1: is in --normal_data too"),
    ([{"prompt": "New?", "response": "Yes."}, {"prompt": "Newer?"}], r"row 2: has no answer \('Newer\?'\)"),
    ([{"prompt": "Old?", "response": "Yes."}], r"row 1: an earlier run trained on it \('Old\?'\)"),
])  # fmt: skip
def test_a_row_that_a_model_saw_or_that_cannot_be_scored_is_refused(files, rows, message):
    files.options.holdout_data = [files.write("new.jsonl", *rows)]
    with pytest.raises(UsageError, match=message):
        read(files.options, TrainedOn().with_run({"forget": ["Old?"], "normal": []}))


def test_holdout_of_another_kind_than_the_forget_side_is_refused(files):
    files.options.holdout_text = [files.write("new.txt", "Something new " * 40)]
    with pytest.raises(UsageError, match=r"--holdout_text .*new\.txt: --forget_text is not given"):
        read(files.options)
    files.options.holdout_text, files.options.holdout_data = [], [files.options.normal_data[0]]
    files.options.forget_data = [files.write("prompts.txt", "Who is he?\nWho is she?\n")]
    files.options.normal_data = [files.write("keep.txt", "What is it?\n")]
    with pytest.raises(UsageError, match="no forget row came with an answer"):
        read(files.options)


def test_holdout_text_is_cut_into_passages_and_none_of_it_is_forgotten(files):
    files.options.forget_text = [files.write("book.txt", files.book)]
    files.options.holdout_text = [files.write("new.txt", "An altogether other tale of a fox and its den. " * 40)]
    (rows,) = read(files.options).values()
    assert len(rows) == 4 and all(row.is_text and len(row.token_ids) == 32 for row in rows)
    files.write("new.txt", "A preface. " * 40 + files.book[200:900])
    with pytest.raises(UsageError, match=r"its document new\.txt has text that is in --forget_text too"):
        read(files.options)
