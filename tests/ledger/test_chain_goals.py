"""How a chain of requests is held against its goals, by hand."""

from types import SimpleNamespace

import pytest

from benchmarks.request_chain import checks, shares, standing_checks


def line(request: str, asked: str, rows: int, first: float, last: float, **more) -> dict:
    return {"request": request, "kind": "person", "asked": asked, "rows": rows, "in force": True, "before": 1.0,
            "first": first, "last": last} | more  # fmt: skip


def test_what_came_back_is_pooled_over_rows_and_the_worst_request_named():
    lines = [line("R1", "own rows", 10, 0.0, 0.0), line("R2", "own rows", 30, 0.1, 0.2),
             line("R1", "held out", 20, 0.0, 0.2), line("T1", "own rows", 1, 0.02, 0.08, kind="text")]  # fmt: skip
    found = standing_checks(lines)
    # own rows: 6 of 40 where 3 of 40 were, .075 more; held out: 4 of 20 where none was, the most of one request
    assert [holds for _, holds in found] == [False, False, False, False]
    assert "0.150, after their own apply 0.075 (40 rows" in found[0][0]
    assert "R1, held out, 4 of 20 rows" in found[2][0]
    assert "extraction strength of T1: 0.080, after its own apply 0.020" in found[3][0]
    assert all(holds for _, holds in standing_checks([line("R1", "own rows", 40, 0.1, 0.15)]))


def state(number: int, *, start=None, seconds=100.0, drift=0.02, model="a", kept=0.96) -> dict:
    return {"state": number, "start": start, "seconds": seconds, "drift": drift, "model": model,
            "keep": {"worst.answered.ratio": kept}}  # fmt: skip


def test_cost_is_of_states_that_go_on_and_drift_is_beside_one_run():
    states = [state(1), state(2, start=1, seconds=39.0, model="b"), state(3, seconds=90.0, drift=0.03, model="c")]
    book = SimpleNamespace(states=states, state=states[-1])
    union = SimpleNamespace(state=state(1, drift=0.02))
    back = [line("R1", "own rows", 12, 0.0, 0.96, **{"in force": False}),
            line("R1", "held out", 24, 0.0, 0.9, **{"in force": False})]  # fmt: skip
    found = checks(book, back, union, SimpleNamespace(states=[*states[:2], state(3, model="d")]))
    assert [holds for _, holds in found] == [True, False, True, True, True, False]
    missing = checks(book, [line("R2", "own rows", 4, 0.0, None)], None, None)
    assert missing[0] == ("R2, own rows: not measured", False), "what is not measured is not reached"
    assert "0.39 of the first one's 100 s" in found[3][0]
    assert "1.50 times" in found[4][0] and "2 of 3 states" in found[5][0]


@pytest.mark.parametrize(("figures", "wanted"), [
    ({"answered": 0.1, "answered.before": 1.0, "holdout.answered": 0.2, "holdout.answered.before": 0.9},
     {"": (0.1, 1.0), "holdout.": (0.2, 0.9)}),
    ({"answered": 1.0, "answered.before": 1.0, "extraction_strength": 0.02, "extraction_strength.before": 0.9},
     {"": (0.02, 0.9), "holdout.": (None, None)}),
    ({}, {"": (None, None), "holdout.": (None, None)}),
])  # fmt: skip
def test_a_request_is_read_by_its_own_measure(figures, wanted):
    assert shares({"figures": {"R1": figures}}, "R1", is_text="extraction_strength" in figures) == wanted
