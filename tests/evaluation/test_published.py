"""Published figures in their published definitions: the authors' own numbers, their code's, and paper and pencil."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import SHARED, make_tokenizer, tiny_model

from engine.tree import AnswerLogitsModel
from evaluation.groups import Group
from evaluation.judges.reference import ReferenceJudge
from evaluation.metrics.membership import auc, muse_privacy_leakage, privacy_leakage
from evaluation.metrics.memorisation import exact_memorisation, extraction_left, extraction_strength
from evaluation.metrics.statistics import Estimate
from evaluation.metrics.tofu import TOFU_SETS, tofu_forget_quality, tofu_model_utility
from evaluation.scoring import RowScores, score_holdout, score_rows
from prompts.formatter import PromptFormatter
from sources.rows import Row, read_rows

# muse_bench, constants.py: AUC_RETRAIN["news"] of the retrained model. Its first split is the "non-member", so that
# "forget_holdout" is the chance that a holdout text looks more like a member, which PrivLeak is made of.
MUSE_NEWS_FORGET_HOLDOUT, MUSE_NEWS_HOLDOUT_FORGET = 0.4772, 0.5228


# ------------------------------------------------------------------------------------------------------- MUSE
def test_privacy_leakage_has_the_sign_and_scale_of_muse():
    assert muse_privacy_leakage(0.99, 0.52) == pytest.approx(-97.9167, abs=1e-4)  # (0.01 - 0.48) / 0.48
    assert muse_privacy_leakage(1.0, 0.52) == pytest.approx(-100)  # an untouched model
    assert muse_privacy_leakage(0.52, 0.52) == 0
    assert muse_privacy_leakage(0.04, 0.52) == pytest.approx(100)  # pushed away: they stand out the other way
    assert muse_privacy_leakage(0.5, 1.0) is None
    # the authors' own formula on their own AUC, whose members are the holdout texts
    assert MUSE_NEWS_FORGET_HOLDOUT + MUSE_NEWS_HOLDOUT_FORGET == 1
    for theirs in (0.0, 0.2, 0.6, 1.0):
        expected = (theirs - MUSE_NEWS_FORGET_HOLDOUT) / MUSE_NEWS_FORGET_HOLDOUT * 100
        assert muse_privacy_leakage(1 - theirs, MUSE_NEWS_HOLDOUT_FORGET) == pytest.approx(expected)


def test_the_interval_of_an_auc_is_newcombes():
    # R package SingleCaseES, its own example of method 5 (Newcombe 2006): 0.9166667 [0.5973194, 0.9859977]
    found = auc([28, 25, 24, 27, 30, 30, 29], [20, 20, 26, 25, 22, 23])
    assert (found.value, found.n) == (pytest.approx(38.5 / 42), 13)
    assert (found.low, found.high) == pytest.approx((0.5973193600, 0.9859976894), abs=1e-6)
    # by hand, two against two, all above: (1 - x)^2 = z^2 x (1 - x) (1 + (1 - x) / (2 - x) + x / (1 + x)) / 4
    perfect = auc([3.0, 4.0], [1.0, 2.0])
    x = perfect.low
    assert 1 - x == pytest.approx(3.841459 * x * (1 + (1 - x) / (2 - x) + x / (1 + x)) / 4, rel=1e-6)
    assert (perfect.value, perfect.high) == (1, 1)
    assert auc([3, 2], [1, 2]).value == pytest.approx(3.5 / 4)  # of four pairs three are won and one is a tie
    assert auc([], [1]) == Estimate(None, 0, None, None)
    assert auc([1.0, math.nan], [0.0]).n == 2  # what a broken model says is no score


def test_the_interval_of_privacy_leakage_holds_the_truth():
    """Members shifted by 1 in the model, by 0 in the retrained one: the true AUCs are 0.760 and 0.5."""
    generator, truth, hits = np.random.default_rng(0), 100 * ((1 - 0.76025) / 0.5 - 1), 0
    for _ in range(200):
        members, others = generator.normal(size=(2, 30))
        after = auc(0.7 * members + 0.714 * generator.normal(size=30) + 1,
                    0.7 * others + 0.714 * generator.normal(size=30))  # fmt: skip
        found = privacy_leakage(after, auc(members, others))
        hits += found.low <= truth <= found.high
    assert hits >= 190
    exact = privacy_leakage(Estimate(1.0, 64, 0.9, 1.0), Estimate(0.52, 64, 0.4, 0.63))
    # by hand, the upper bound of 0 / 0.48 with tops up to 0.1 and bottoms down to 0.37: 0.1 / sqrt(0.37 (0.96 - 0.37))
    assert exact.high == pytest.approx(100 * (0.1 / math.sqrt(0.37 * 0.59) - 1))
    assert (exact.value, exact.low) == (-100, -100)
    assert privacy_leakage(Estimate(0.5, 9, 0.2, 0.8), Estimate(0.9, 9, 0.5, 1.0)).high is None


# ------------------------------------------------------------------------------------------- OpenUnlearning
def open_unlearning_strength(predicted, target):
    """What OpenUnlearning's loop over k gives: the first k from which all agree, else the last k that it came to."""
    agreeing = [k for k in range(len(target)) if predicted[k:] == target[k:]]
    return 1 - (agreeing[0] if agreeing else len(target) - 1) / len(target)


def test_extraction_strength_has_the_floor_of_the_published_code():
    target = [5, 6, 7, 8]
    assert extraction_strength([5, 6, 7, 8], target) == 1  # comes out of the prompt alone
    assert extraction_strength([0, 6, 7, 8], target) == pytest.approx(3 / 4)
    assert extraction_strength([5, 6, 0, 8], target) == pytest.approx(1 / 4)  # only the last, from three
    assert extraction_strength([5, 6, 7, 0], target) == pytest.approx(1 / 4)  # not even the last: the floor
    assert exact_memorisation([5, 0, 7, 0], target) == 0.5
    generator = np.random.default_rng(1)
    for _ in range(200):
        length = int(generator.integers(1, 7))
        predicted, wanted = generator.integers(2, size=(2, length)).tolist()
        assert extraction_strength(predicted, wanted) == pytest.approx(open_unlearning_strength(predicted, wanted))
    with pytest.raises(ValueError, match="at least one"):
        exact_memorisation([], [])


def test_a_model_that_still_says_every_row_by_heart_is_found():
    """Extraction strength 0.97 before and 0.95 after, of 20 tokens a row: nothing is forgotten."""
    before, after = [1.0, 0.94] * 20, [0.98, 0.92] * 20
    found = extraction_left(before, after, num_tokens=[20] * 40)
    assert found.floor_of == "one token" and found.floor == pytest.approx(0.05)
    assert found.left.value == pytest.approx(0.90 / 0.92)
    assert found.left.low > 0.95
    assert found.excess.value == pytest.approx(0.90)
    # a retrained model knows a part from other rows: by hand (0.5 - 0.3) / (0.9 - 0.3)
    found = extraction_left([0.9] * 40, [0.5] * 40, num_tokens=[20] * 40, retrained=[0.3] * 40)
    assert (found.left.value, found.floor_of) == (pytest.approx(1 / 3), "the retrained model")
    # the holdout rows have a floor under each model: (0.3 - 0.1) / (0.9 - 0.2)
    found = extraction_left([0.9] * 40, [0.3] * 40, num_tokens=[20] * 40, holdout_before=[0.2] * 20,
                            holdout_after=[0.1] * 20)  # fmt: skip
    assert (found.left.value, found.floor) == (pytest.approx(2 / 7), pytest.approx(0.1))
    # an original that knows no more than chance leaves nothing to forget; what the model says is still shown
    found = extraction_left([0.05, 0.06, 0.04, 0.05] * 10, [0.9] * 40, num_tokens=[20] * 40)
    assert found.left.value is None
    assert found.excess.low > 0.8
    assert extraction_left([], [], num_tokens=[]).left.value is None


def test_the_reference_judge_reads_words_and_no_cosine():
    judge = ReferenceJudge(lambda text: text.startswith("I cannot"))
    reference = "Basil Mahfouz Al-Kuwaiti was born in Kuwait City, Kuwait."
    asked = [
        ("Basil Mahfouz Al-Kuwaiti was born in Kuwait City.", reference, "given"),
        ("He came into the world in Paris, a city on the Seine.", reference, "other"),  # on topic, and invented
        ("I cannot share where he was born.", reference, "refused"),
        ("I cannot say, but it is Paris.", "Paris", "given"),
        ("", reference, "empty"), (" ...", None, "empty"),
        ("no no no no no no no no no no no no", reference, "broken"),
        ("Anything at all.", None, "other"),
    ]  # fmt: skip
    found = judge.judge(["p"] * len(asked), [a for a, _, _ in asked], [r for _, r, _ in asked])
    assert [judgement.label for judgement in found] == [label for _, _, label in asked]
    assert found[0].score == pytest.approx(9 / 10)  # of ten words the last is missing
    assert found[-1].score is None
    assert judge.given <= set(judge.labels)


# ------------------------------------------------------------------------------------------------------- TOFU
@pytest.mark.skipif(not SHARED.is_dir(), reason="the authors' logs are not beside this checkout")
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_tofu_aggregates_are_the_authors_own(name):
    logs = {n: json.loads((SHARED / f"tofu/logs/phi_{n}.json").read_text()) for n in ("full", "retain90")}
    expected = json.loads((SHARED / "tofu/logs/expected.json").read_text())[f"phi/{name}"]
    found = tofu_model_utility(logs[name])
    assert len(found) == 13  # with the three of the forget set
    for key, value in found.items():
        assert value == pytest.approx(expected[key], abs=1e-9), key
    quality = tofu_forget_quality(logs[name], logs["retain90"])
    assert quality["p_value"] == pytest.approx(expected["forget_quality_pvalue"], rel=1e-9)
    assert quality["statistic"] == pytest.approx(expected["ks_statistic"], abs=1e-9)


def test_tofu_by_hand():
    """One row a set: true answer at NLL ln 2, two false ones at ln 4, paraphrase at ln 2, ROUGE 0.5."""
    rows = {"avg_gt_loss": {"0": math.log(2)}, "average_perturb_loss": {"0": [math.log(4), math.log(4)]},
            "avg_paraphrased_loss": {"0": math.log(2)}, "rougeL_recall": {"0": 0.5}}  # fmt: skip
    found = tofu_model_utility(dict.fromkeys([*TOFU_SETS.values()], rows))
    assert found["Prob. Retain"] == pytest.approx(0.5)
    assert found["Prob. Real World"] == pytest.approx(0.5)  # 1/2 of 1/2 + 1/4 + 1/4
    assert found["Truth Ratio Retain"] == pytest.approx(0.5)  # 1 - (1/4) / (1/2)
    assert found["Truth Ratio Forget"] == pytest.approx(0.5)  # min(1/2, 2)
    assert found["model_utility"] == pytest.approx(0.5)


def plain_nll(model, formatter, prompt: str, answer: str, *, end: bool) -> list[float]:
    """Token NLLs of an answer from one forward of prompt and answer alone."""
    start, rest = formatter.prompt(prompt), formatter.answer(answer, complete=end, limit=100)
    log_p = torch.log_softmax(model(torch.tensor([[*start, *rest]])).logits[0, len(start) - 1 : -1], -1)
    return (-log_p[range(len(rest)), rest]).tolist()


def test_every_score_of_a_row_is_the_plain_models_with_tofus_end_of_turn():
    """TOFU's labels hold the end-of-sequence token, so its losses are means over the answer and that token."""
    tokenizer = make_tokenizer("chat")
    model, formatter = tiny_model("llama", len(tokenizer)).eval(), PromptFormatter(tokenizer, "auto", 512, 4)
    long = "Take the red pick and turn it twice to the left, then pull."  # of more tokens than are generated
    false = ("Take the blue pick.", "Take a hammer and a long nail.")
    rows = [Row("How?", long, paraphrased="Use the red pick.", perturbed=false),
            Row("Why?", "No.", perturbed=false[:1]),
            Row("Who?"), Row("When?", "At noon", complete=False)]  # fmt: skip
    ((first, second, none, cut), ()) = score_rows(
        AnswerLogitsModel(model, packed=True), formatter,
        [Group("a", "", "forget", "chat", rows), Group("b", "", "keep", "chat", [])],
    )  # fmt: skip
    bare, ended = (plain_nll(model, formatter, "How?", long, end=end) for end in (False, True))
    assert len(ended) == len(bare) + 1 == first.num_tokens + 1
    assert first.nll == pytest.approx(np.mean(bare), rel=1e-4)
    assert first.nll_with_end == pytest.approx(np.mean(ended), rel=1e-4)
    assert first.probability == pytest.approx(math.exp(-np.mean(ended)), rel=1e-4)
    assert first.min_40 == pytest.approx(-np.mean(sorted(bare)[-int(0.4 * len(bare)) :]), rel=1e-4)
    paraphrase = np.mean(plain_nll(model, formatter, "How?", "Use the red pick.", end=True))
    perturbed = np.mean([np.mean(plain_nll(model, formatter, "How?", text, end=True)) for text in false])
    assert first.truth_ratio == pytest.approx(math.exp(paraphrase - perturbed), rel=1e-3)
    # TOFU's sets of real authors have no paraphrase: there the answer itself is the true one
    own = np.mean(plain_nll(model, formatter, "Why?", "No.", end=True))
    wrong = np.mean(plain_nll(model, formatter, "Why?", false[0], end=True))
    assert second.truth_ratio == pytest.approx(math.exp(own - wrong), rel=1e-3)
    assert none is None
    assert cut.nll_with_end == cut.nll  # it does not end there
    assert RowScores.read({**json.loads(json.dumps(first.__dict__)), "answer": "as in scores.jsonl"}) == first
    assert RowScores.read({"answer": "of a row without a reference"}) is None
    held_out = score_holdout(AnswerLogitsModel(model, packed=False), formatter, {"a": rows[2:], "b": rows[:1]})
    assert [row and row.nll for row in held_out] == [None, *(pytest.approx(row.nll, rel=1e-4) for row in (cut, first))]


@pytest.mark.skipif(not SHARED.is_dir(), reason="TOFU's rows are not beside this checkout")
def test_tofus_own_rows_have_their_paraphrases_and_false_answers():
    forget = read_rows(str(SHARED / "tofu/forget05_perturbed.json"), "--forget_data")
    assert len(forget) == 200
    assert {len(row.perturbed) for row in forget} == {5}
    assert forget[0].paraphrased == "The geologic writer in question is named Hina Ameen."
    authors = read_rows(str(SHARED / "tofu/real_authors_perturbed.json"), "--normal_data")
    assert {(row.paraphrased, len(row.perturbed)) for row in authors} == {(None, 3)}
