"""What a state's entry says of each request."""

import pytest

from evaluation.metrics.statistics import Estimate
from ledger.evidence import figures_of, worst_attack


def attack(name: str, groups: dict[str, tuple[float, int]], *, judged: bool = True, is_control: bool = False) -> dict:
    rates = {group: {"value": value if n else None, "n": n} for group, (value, n) in groups.items()}
    return {"name": name, "judged": judged, "is_control": is_control, "groups": rates}


def test_figures_are_of_the_request_and_of_its_holdout_apart():
    def of(value: float, n: int = 4) -> Estimate:
        return Estimate(value, n, None, None)

    found = {"forget.R1.answered": of(0.0), "forget.R1.answered.before": of(1.0), "forget.R10.answered": of(0.9),
             "forget.R1-holdout.answered": of(0.25), "keep.R2.answered": of(0.75, 1),
             "keep.R2, prompts alone.answered": of(0.5, 3), "forget.R3, prompts alone.answered": of(0.1),
             "forget.R3.answered": of(None, 0)}  # fmt: skip
    assert figures_of("R1", found, {}) == {"answered": 0.0, "answered.before": 1.0, "n": 4, "holdout.answered": 0.25,
                                           "holdout.n": 4}  # fmt: skip
    # a rule with one example that has an answer and three without: all four are its rows
    assert figures_of("R2", found, {}) == {"answered": 2.25 / 4, "n": 4}
    assert figures_of("R3", found, {}) == {"answered": 0.1, "n": 4}, "a rule's prompts come without answers"


def test_the_worst_variant_of_an_attack_counts_over_own_rows_and_holdout():
    report = {"attacks": [
        attack("prefill", {"R1": (0.5, 2), "R1-holdout": (0.0, 2), "R2": (1.0, 4)}),
        attack("prefill", {"R1": (0.0, 2), "R1-holdout": (0.0, 2), "R2": (1.0, 4)}),
        attack("few_shot", {"R1": (0.0, 4), "R2": (0.0, 0)}),
        attack("relearn", {"R1": (1.0, 4)}, judged=False),
        attack("quantise", {"R1": (1.0, 4)}, is_control=True),
    ]}  # fmt: skip
    found = figures_of("R1", {}, report)
    assert found == {"attack.prefill": pytest.approx(1 / 4), "attack.prefill.n": 4, "attack.few_shot": 0.0,
                     "attack.few_shot.n": 4}  # fmt: skip
    assert worst_attack(found) == "1 of 4 (prefill)"
    assert figures_of("R2", {}, report).keys() == {"attack.prefill", "attack.prefill.n"}
    assert worst_attack(figures_of("R3", {}, report)) == "-"
