"""What a state's entry says of each request."""

import pytest

from ledger.evidence import figures_of, worst_attack


def attack(name: str, groups: dict[str, tuple[float, int]], *, judged: bool = True, is_control: bool = False) -> dict:
    rates = {group: {"value": value if n else None, "n": n} for group, (value, n) in groups.items()}
    return {"name": name, "judged": judged, "is_control": is_control, "groups": rates}


def test_figures_are_of_the_request_and_of_its_holdout_apart():
    values = {"forget.R1.answered": 0.0, "forget.R1.answered.before": 1.0, "forget.R1-holdout.answered": 0.25,
              "forget.R10.answered": 0.9, "keep.R2.answered": 0.75, "keep.R2, prompts alone.answered": 0.5,
              "forget.R3, prompts alone.answered": 0.1}  # fmt: skip
    assert figures_of("R1", values, {}) == {"answered": 0.0, "answered.before": 1.0, "holdout.answered": 0.25}
    assert figures_of("R2", values, {}) == {"answered": 0.75}
    assert figures_of("R3", values, {}) == {"answered": 0.1}, "a rule's prompts come without answers"


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
