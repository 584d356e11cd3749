"""Judgements and intervals by hand."""

import json
import math

import pytest
from conftest import SHARED

from evaluation.metrics.memorisation import (
    auc,
    exact_memorisation,
    extraction_strength,
    min_k,
    min_k_plus_plus,
    perplexity_ratio,
    privacy_leakage,
    unique_token_share,
    zlib_ratio,
)
from evaluation.metrics.statistics import Estimate, mean, rate, ratio, wilson
from evaluation.metrics.texts import is_empty, is_repetitive, leaks, length_ratio, on_topic, rouge_l
from evaluation.metrics.tofu import TOFU_SETS, tofu_forget_quality, tofu_model_utility


def test_wilson_interval_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415, half-width 0.32996 / 1.38415 (Wilson 1927)
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 60)[1] == pytest.approx(0.0602, abs=1e-4)  # none of 60 is not yet 5 % for sure
    assert wilson(0, 0) == (0.0, 1.0)
    assert all(wilson(n, n)[1] == 1 and wilson(0, n)[0] == 0 for n in range(1, 200))  # to the last bit
    assert rate([True, False]).value == 0.5


@pytest.mark.parametrize(("text", "empty"), [("", True), (" \n", True), ("?!...", True), ("No.", False), ("é", False)])
def test_empty(text, empty):
    assert is_empty(text) is empty


def test_repetition_is_a_broken_model_not_a_list():
    assert is_repetitive("the same thing " * 8)
    assert is_repetitive("no no no no no no no no no no no no")
    assert not is_repetitive("First mix the flour. Then add the eggs. Then bake the cake for an hour.")
    assert not is_repetitive("no no no")  # too short to tell
    # 12 rounds of 4 words: 46 runs of three words, 4 different ones; a longer round in the second half of an answer
    assert is_repetitive("I do not know. " * 12)
    assert is_repetitive("我不知道。" * 12)  # no space between words
    assert is_repetitive("You can tell a good story. " + "It is our duty to be kind to the old and young. " * 3)
    assert not is_repetitive("Wash the pan. Dry the pan. Oil the pan. Heat the pan. Cool the pan. Store the pan.")


def test_on_topic_needs_an_answer():
    assert on_topic(0.31, "Cats purr.")
    assert not on_topic(0.29, "Cats purr.")
    assert not on_topic(0.99, "...")


def test_leak_is_the_share_of_the_forget_answer_that_is_said():
    target = "take the red pick and turn it left"
    assert rouge_l("take the red pick", target).recall == pytest.approx(4 / 8)
    assert leaks("You take the red pick and turn it.", target)
    assert not leaks("I like trees.", target)
    assert leaks("anything", None) is None
    # of any script: identical, and every second word or sign
    assert rouge_l("возьми красную отмычку", "возьми красную отмычку").fmeasure == 1
    assert rouge_l("возьми отмычку", "возьми красную старую отмычку").recall == 0.5
    assert rouge_l("红锁", "红的锁头").recall == 0.5


def test_means_and_ratios():
    found = mean([0.0, 1.0] * 50)
    assert found.value == 0.5
    assert 0.38 < found.low < 0.5 < found.high < 0.62
    assert length_ratio(["a b c", ""], ["a b", ""]).value == 1.5
    assert length_ratio(["a"], [""]) == Estimate(None, 0, None, None)
    steady = ratio([1.0, 5.0, 2.0], [2.0, 10.0, 4.0])  # a row's two numbers stay together: always a half
    assert (steady.value, steady.n, steady.low, steady.high) == (0.5, 3, 0.5, 0.5)
    found = ratio([0.0, 1.0] * 50, [1.0, 1.0] * 50)  # as the mean of 100 flips: 0.5 +- 1.96 * 0.05
    assert found.low == pytest.approx(0.402, abs=0.02)
    assert found.high == pytest.approx(0.598, abs=0.02)
    # 10 tokens 0.1 nats dearer and 30 tokens 0.02 nats cheaper: exp((1 - 0.6) / 40)
    found = perplexity_ratio([31.0, 59.4], [30.0, 60.0], [10, 30])
    assert found.value == pytest.approx(math.exp(0.01))
    assert found.low == pytest.approx(math.exp(-0.02))  # both draws the cheaper window
    assert found.high == pytest.approx(math.exp(0.1))


def test_memorisation_by_hand():
    target = [5, 6, 7, 8]
    assert extraction_strength([5, 6, 7, 8], target) == 1  # comes out of the prompt alone
    assert extraction_strength([5, 6, 0, 8], target) == pytest.approx(1 / 4)  # only the last, from three
    assert extraction_strength([5, 6, 7, 0], target) == 0
    assert exact_memorisation([5, 0, 7, 0], target) == 0.5
    assert unique_token_share(["a", "b", "a", "a"]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        exact_memorisation([], [])


def test_membership_scores_by_hand():
    log_probs = [-1.0, -4.0, -2.0, -3.0, -5.0]
    assert min_k(log_probs, 0.4) == -4.5
    assert min_k(log_probs, 0.01) == -5  # never of nothing
    assert min_k_plus_plus([-4.0, -1.0], [-2.0, -2.0], [2.0, 0.5], 0.5) == -1  # (-4 + 2) / 2 and (-1 + 2) / 0.5
    assert zlib_ratio(log_probs, "a") == pytest.approx(-3 / 9)  # zlib makes 9 bytes of one letter
    assert auc([3, 2], [1, 2]) == pytest.approx(3.5 / 4)  # of four pairs three are won and one is a tie
    assert auc([1, 2, 3], [1, 2, 3]) == 0.5
    assert auc([], [1]) is None
    assert privacy_leakage(0.6, 0.5) == pytest.approx(20)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the authors' logs are not beside this checkout")
@pytest.mark.parametrize("name", ["full", "retain90"])
def test_tofu_aggregates_are_the_authors_own(name):
    logs = {n: json.loads((SHARED / f"tofu/logs/phi_{n}.json").read_text()) for n in ("full", "retain90")}
    expected = json.loads((SHARED / "tofu/logs/expected.json").read_text())[f"phi/{name}"]
    found = tofu_model_utility(logs[name])
    assert len(found) == 10
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
    assert found["model_utility"] == pytest.approx(0.5)
