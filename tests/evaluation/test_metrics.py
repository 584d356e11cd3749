"""Judgements and intervals by hand."""

import math

import numpy as np
import pytest

from evaluation.measures import MEASURES
from evaluation.metrics.memorisation import perplexity_ratio, unique_token_share
from evaluation.metrics.statistics import Estimate, bootstrap_sums, mean, rate, ratio, wilson
from evaluation.metrics.texts import contains, is_empty, is_repetitive, leaks, on_topic, rouge_l
from sources.words import words_of


def length_ratio(after: list[str], before: list[str]):
    """Return the figure of the measure of that name for these texts."""
    (measure,) = (measure for measure in MEASURES if measure.name == "length_ratio")
    return measure.aggregate([(len(words_of(x)), len(words_of(y))) for x, y in zip(after, before, strict=True)])


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


def test_a_bootstrap_draws_rows_whole_and_as_often_as_chance_does():
    rows = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    drawn = bootstrap_sums(rows, draws=500)
    assert np.array_equal(drawn[:, 1], 10 * drawn[:, 0])  # a row's numbers stay together
    assert set(drawn[:, 0]) == {float(a + b + c) for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert np.array_equal(drawn, bootstrap_sums(rows, draws=500))  # the same samples for every measure of a group
    # of a table too large to keep: the mean of n flips is within 1.96 * 0.5 / sqrt(n)
    found = mean([0.0, 1.0] * 3000)
    assert (found.low, found.high) == pytest.approx((0.4873, 0.5127), abs=0.001)


def test_an_answer_contains_a_short_reference_in_any_writing():
    assert contains("It was  WILLIAM\nShakespeare!", "William Shakespeare")
    assert contains("About 3.14, or so", "3.14")
    assert contains("We use C++ here", "C++") and not contains("We use C here", "C++")
    assert contains("答案是巴黎。", "巴黎")
    assert not contains("The start of it", "art")  # a part of a word is none
    assert not contains("Shakespeare, William", "William Shakespeare")
    assert contains("anything", None) is None


def test_diversity_by_hand():
    assert unique_token_share(["a", "b", "a", "a"]) == 0.5
