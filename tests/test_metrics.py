"""Judgements and intervals by hand."""

import pytest

import metrics


def test_wilson_interval_by_hand():
    # 8 of 10, z = 1.96: centre (0.8 + 0.19207) / 1.38415, half-width 0.32996 / 1.38415 (Wilson 1927)
    low, high = metrics.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert metrics.wilson(0, 60)[1] == pytest.approx(0.0602, abs=1e-4)  # none of 60 is not yet 5 % for sure
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.rate([True, False])["value"] == 0.5


@pytest.mark.parametrize(("text", "empty"), [("", True), (" \n", True), ("?!...", True), ("No.", False), ("é", False)])
def test_empty(text, empty):
    assert metrics.is_empty(text) is empty


def test_repetition_is_a_broken_model_not_a_list():
    assert metrics.is_repetitive("the same thing " * 8)
    assert metrics.is_repetitive("no no no no no no no no no no no no")
    assert not metrics.is_repetitive("First mix the flour. Then add the eggs. Then bake the cake for an hour.")
    assert not metrics.is_repetitive("no no no")  # too short to tell


def test_on_topic_needs_an_answer():
    assert metrics.on_topic(0.31, "Cats purr.")
    assert not metrics.on_topic(0.29, "Cats purr.")
    assert not metrics.on_topic(0.99, "...")


def test_leak_is_the_share_of_the_forget_answer_that_is_said():
    target = "take the red pick and turn it left"
    assert metrics.rouge_l_recall("take the red pick", target) == pytest.approx(4 / 8)
    assert metrics.leaks("You take the red pick and turn it.", target)
    assert not metrics.leaks("I like trees.", target)
    assert metrics.leaks("anything", None) is None


def test_means_and_ratios():
    found = metrics.mean([0.0, 1.0] * 50)
    assert found["value"] == 0.5
    assert 0.38 < found["low"] < 0.5 < found["high"] < 0.62
    assert metrics.length_ratio(["a b c"], ["a b", ""]) == 1.5
    assert metrics.length_ratio(["a"], [""]) is None
