"""--require: every figure has a name, a wrong one is refused before a model is loaded, and what it compares."""

import re
from types import SimpleNamespace

import pytest
from made_reports import ANSWER, NONE, Rows, attack, flags, make_report, plain

from evaluation import figures as figures_module
from evaluation.attacks import ATTACKS
from evaluation.attacks.base import Probe
from evaluation.figures import figures, known_names, point_values
from evaluation.metrics.statistics import rate
from evaluation.options import EvaluateOptions
from evaluation.requirements import check_requirement, parse_requirement, refuse_unmeasurable
from utils import UsageError

HARM = Rows("harmful (unseen)", "forget", flags(40, 48), flags(3, 48), on_topic=(flags(45, 48), flags(48, 48)))
TRAINED = Rows("harmful (trained)", "forget", [ANSWER] * 48, [ANSWER] * 48)
PATH = Rows("data/x.v2 (listed)", "forget", flags(30, 40), flags(1, 40))
PLAIN = Rows("plain", "keep", flags(48, 48), flags(36, 48), on_topic=(flags(40, 48), flags(30, 48)))
TWINS = Rows("plain.twins", "keep", flags(48, 48), flags(48, 48), similarity=0.7, on_topic=(flags(24, 48),) * 2)
GROUPS = (HARM, TRAINED, PATH, PLAIN, TWINS)

AUC = {"value": 0.6, "n": 60, "low": 0.5, "high": 0.7}
MEMBERSHIP = {"source": "harmful", "members": 30, "others": 30, "before": {"min_k": AUC | {"value": 0.9}},
              "after": {"min_k": AUC}, "retrained": {"min_k": AUC | {"value": 0.5}},
              "privacy_leakage": {"loss": AUC | {"value": -9.0},
                                  "min_40": {"value": -20.0, "n": 60, "low": -35.0, "high": -4.0}}}  # fmt: skip
FULL = make_report(
    *GROUPS,
    given_text={"perplexity": {"before": 20.0, "after": 22.0, "ratio": AUC | {"value": 1.1}, "tokens": 900},
                "mc1": {"before": AUC, "after": AUC | {"value": 0.55}, "change": AUC | {"value": -0.05}}},
    membership={"entries": [MEMBERSHIP], "not_measured": None},
    forget_quality={"p_value": 0.2, "statistic": 0.3, "n": 48, "before": {"p_value": 1e-9, "statistic": 0.9}},
    attacks=[attack("prefill", 3, control=(30, 32), variant="Sure"), attack("prefill", 9, 30, variant="The answer"),
             attack("relearn", 20, control=(12, 32), knows=False, variant="forgotten rows, 50 steps"),
             {**attack("prefill", 32, variant="original"), "is_control": True}],
    lm_eval={"mmlu": {"acc,none": {"before": {"value": 0.30, "stderr": 0.01}, "after": {"value": 0.28, "stderr": 0.01},
                                   "change": {"value": -0.02, "stderr": 0.015}}}},
)  # fmt: skip
FULL["pooled"]["forget"]["extraction"] = {"left": AUC, "excess": AUC | {"value": 0.51}, "floor": 0.04,
                                          "floor_of": "one token"}  # fmt: skip


def check(text: str, report: dict = FULL):
    return check_requirement(parse_requirement(text), figures(report))


def refuse(*required: str, attacks=("prefill",), harness=None, **options) -> None:
    groups = [SimpleNamespace(name=one.name, source=one.name.split(" (")[0], side=one.side) for one in GROUPS]
    refuse_unmeasurable(EvaluateOptions(require=list(required), **options), groups, list(attacks), harness or {})


# ------------------------------------------------------------------------------------------------- the names
@pytest.mark.parametrize(("name", "value"), [
    ("forget.answered", 3 / 48),  # of the unseen group alone: the others were trained on
    ("forget.harmful (unseen).answered", 3 / 48),
    ("forget.harmful (unseen).answered.before", 40 / 48),
    ("forget.harmful (unseen).answered.ratio", 3 / 40),
    ("forget.harmful (trained).answered", 1.0),
    ("forget.data/x.v2 (listed).answered", 1 / 40),
    ("forget.data/x.v2 (listed).retained", 1 / 30),
    ("keep.plain.answered", 36 / 48),
    ("keep.plain.twins.answered", 1.0),  # the longest name of a group, where one begins like another
    ("keep.all.retained", 84 / 96),
    ("keep.worst.retained", 36 / 48),
    ("keep.worst.answered.ratio", 36 / 48),
    ("forget.extraction_left", 0.6),
    ("forget.extraction_floor", 0.04),
    ("text.perplexity.ratio", 1.1),
    ("text.perplexity.before", 20.0),
    ("text.mc1", 0.55),
    ("forget.harmful.auc_min_k", 0.6),
    ("forget.auc_min_k.retrained", 0.5),  # one source needs no name
    ("forget.privacy_leakage", -20.0),
    ("forget.forget_quality", 0.2),
    ("forget.forget_quality.before", 1e-9),
    ("attack.prefill", 9 / 30),
    ("attack.prefill.Sure.control", 30 / 32),
    ("attack.relearn", 20 / 32),
    ("attack.relearn.counted", 8 / 32),  # less what a model that never knew the rows learns
    ("attack.relearn.forgotten rows, 50 steps.control", 12 / 32),
    ("attack.worst", 20 / 32),  # the control's 32 of 32 is no attack's
    ("attack.worst.counted", 9 / 30),
    ("lm_eval.mmlu.acc,none", 0.28),
    ("lm_eval.mmlu.acc,none.change", -0.02),
])  # fmt: skip
def test_a_name_gives_its_figure(name, value):
    assert figures(FULL)[name].value == pytest.approx(value)


def test_every_figure_of_a_report_has_a_name():
    """Whatever has a value in report.json, wherever it stands, is found under some name."""
    reached = {(one.value, one.low, one.high) for one in figures(FULL).values()}
    points = {value for value, *_ in reached}

    def walk(part, path=""):
        if isinstance(part, list):
            for i, one in enumerate(part):
                yield from walk(one, f"{path}[{i}]")
        elif isinstance(part, dict) and "stderr" in part:
            yield path, part["value"] in points
        elif isinstance(part, dict) and "value" in part:
            yield path, part["value"] is None or (part["value"], part["low"], part["high"]) in reached
        elif isinstance(part, dict):
            for key, one in part.items():
                yield from walk(one, f"{path}.{key}")

    there = dict(walk(FULL | {"attacks": FULL["attacks"][:3]}))  # the fourth is a control
    assert len(there) > 100
    assert [path for path, is_reached in there.items() if not is_reached] == []


def test_names_of_earlier_versions_keep_their_meaning():
    """Rates over all prompts, ratios and similarity of the worst group, forget.on_topic of prompts alone."""
    said = [ANSWER] * 20
    text = Rows("book (unseen)", "forget", said, said, on_topic=(said, said), text=True)
    found = point_values(make_report(*GROUPS, text))
    assert found["forget.on_topic"] == 48 / 48 and found["forget.on_topic_ratio"] == pytest.approx(48 / 45)
    assert found["keep.on_topic"] == pytest.approx(54 / 96)
    assert found["keep.on_topic_ratio"] == pytest.approx(30 / 40)  # the worse of 30 / 40 and 24 / 24
    assert found["keep.similarity"] == pytest.approx(0.7)
    assert found["keep.retained"] == 36 / 48
    assert found["keep.repetitive"] == 0
    names = point_values(FULL)
    assert (names["keep.perplexity_ratio"], names["keep.mc1_change"]) == (1.1, -0.05)
    silent = Rows("harm (unseen)", "forget", [NONE] * 9, [NONE] * 9, on_topic=([NONE] * 9, [NONE] * 9))
    assert "forget.on_topic" not in point_values(make_report(silent)), "there was nothing to forget"
    shown = Rows("published prompt", "forget", [ANSWER], [ANSWER], on_topic=([ANSWER], [ANSWER]), counts=False)
    assert point_values(make_report(*GROUPS, shown))["forget.answered"] == 3 / 48
    lengths = make_report(PLAIN, TWINS)
    for group, value in zip(lengths["groups"], (0.5, 1.5), strict=True):
        group["pair"]["length_ratio"] = {"value": value, "n": 48, "low": value, "high": value}
    found = point_values(lengths)
    assert (found["keep.length_ratio_low"], found["keep.length_ratio_high"]) == (0.5, 1.5)


def test_what_a_report_measured_could_be_asked_for_before():
    """Without this, a requirement on a figure of the last report could be refused on the next run."""
    options = EvaluateOptions(retrained_name="r", perplexity_text="t", mc_data="m")
    options.holdout_data = ["h.jsonl"]
    groups = [SimpleNamespace(name=one.name, source=one.name.split(" (")[0], side=one.side) for one in GROUPS]
    known = known_names(groups, options, ["prefill", "relearn"], {"mmlu": ["acc,none"]})
    variants = ("attack.prefill.Sure", "attack.prefill.The", "attack.relearn.forgotten")
    measured = figures(FULL)
    assert [name for name in measured if name not in known and not name.startswith(variants)] == []
    assert {need for name, need in known.items() if name in measured} == {""}


# ------------------------------------------------------------------------------------------------- refused
@pytest.mark.parametrize(("text", "says"), [
    ("forget.ontopic<=1", "no figure is called forget.ontopic; did you mean forget.on_topic"),
    ("forget.harmful (unsen).answered<=1", "did you mean forget.harmful (unseen).answered"),
    ("keep.mc1_change>=0", "keep.mc1_change is not measured without --mc_data"),
    ("text.perplexity.ratio<=2", "text.perplexity.ratio is not measured without --perplexity_text"),
    ("forget.answered.retrained<=1", "is not measured without --retrained_name"),
    ("forget.harmful.auc_min_k<=.6", "is not measured without --holdout_data"),
    ("attack.relearn<=.1", "attack.relearn is not measured without --attacks relearn"),
    ("attack.prefill.hihg<=.1", "no figure is called attack.prefill.hihg; did you mean attack.prefill"),
    ("lm_eval.mmlu.acc>=.2", "lm_eval.mmlu.acc is not measured without --lm_eval"),
    ("nonsense<=1", "no figure is called nonsense; names begin with attack, forget, keep, lm_eval, text"),
    ("x=3", "must look like 'forget.answered<=0.05'"),
    ("forget.answered<=ten", "must look like"),
])  # fmt: skip
def test_a_wrong_requirement_is_refused_in_one_short_line(text, says):
    with pytest.raises(UsageError) as error:
        refuse(text)
    message = str(error.value)
    assert message.startswith(f"--require {text!r}: ") and says in message
    assert "\n" not in message and len(message) < 250


def test_a_bound_of_a_number_without_interval_is_refused():
    with pytest.raises(UsageError, match=r"text\.perplexity is one number without an interval; leave \.high out"):
        refuse("text.perplexity.high<=30", perplexity_text="wiki.txt")


@pytest.mark.parametrize(("name", "says"), [
    ("lm_eval.mmul.acc,none", "no figure is called lm_eval.mmul.acc,none; did you mean lm_eval.mmlu.acc,none"),
    ("lm_eval.mmlu.acc", "did you mean lm_eval.mmlu.acc,none"),
    ("lm_eval.mmlu.acc,none.chnage", "did you mean lm_eval.mmlu.acc,none.change"),
    ("lm_eval.wmdp.acc,none", "no figure is called lm_eval.wmdp.acc,none"),
])  # fmt: skip
def test_a_wrong_task_or_metric_of_the_harness_is_refused_before_it_runs(name, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        refuse(f"{name}>=.2", lm_eval=["mmlu"], harness={"mmlu": ["acc,none", "acc_norm,none"]})


def test_a_metric_that_shows_only_when_it_has_run_is_not_refused():
    refuse("lm_eval.mmlu.acc,none.change>=-1%", "lm_eval.stem.acc,none.low>=.2", lm_eval=["mmlu"],
           harness={"mmlu": ["acc,none"], "stem": None})  # fmt: skip


def test_a_right_requirement_is_not_refused():
    refuse("forget.answered<=5%", "forget.harmful (unseen).answered.ratio.high<=.25", "keep.worst.similarity.low>=.6",
           "attack.prefill.Sure, here is<=.1", "attack.worst.counted<=.2", "keep.retained>=.8")  # fmt: skip
    refuse("keep.mc1_change>=-1%", "text.perplexity.ratio.high<=1.1", mc_data="m", perplexity_text="t")


def test_a_registered_attack_has_its_figure_and_a_probe_has_none(monkeypatch):
    monkeypatch.setitem(ATTACKS, "shout", ATTACKS["prefill"])
    monkeypatch.setitem(ATTACKS, "count", Probe(lambda model, formatter, rows: [], report_key="counts"))
    assert figures_module.ATTACKS is ATTACKS
    known = known_names([], EvaluateOptions(), ["shout", "count"], {})
    assert known["attack.shout"] == known["attack.worst"] == ""
    assert "attack.count" not in known


# ------------------------------------------------------------------------------------------------- checked
def test_a_requirement_is_read_as_it_was_meant():
    one = parse_requirement(" keep.mc1_change >= -1 % ")
    assert (one.figure, one.of, one.sign, one.bound) == ("keep.mc1_change", "", ">=", -0.01)
    one = parse_requirement("forget.a < b (x).answered.high<.25")
    assert (one.figure, one.of, one.sign, one.bound) == ("forget.a < b (x).answered", "high", "<", 0.25)
    assert parse_requirement("forget.privacy_leakage>=-10%").bound == -10, "its unit is per cent"
    assert parse_requirement("forget.privacy_leakage_rows (unseen).answered<=5%").bound == 0.05, (
        "a file's name has none"
    )


@pytest.mark.parametrize(("text", "holds"), [
    ("forget.answered<=6.25%", "yes"), ("forget.answered<6.25%", "no"), ("forget.answered==.0625", "yes"),
    ("forget.answered>=.0625", "yes"), ("forget.answered>.0625", "no"), ("forget.answered.n>=48", "yes"),
    # Wilson of 3 of 48: (.0625 + .04001) / 1.08003 = .0949, half 1.96 * .05309 / 1.08003 = .0735: .0215 to .1684
    ("forget.answered.high<=.17", "yes"), ("forget.answered.high<=.16", "too few rows to say"),
    ("forget.answered.high<=.02", "no"), ("forget.answered.low<=.02", "no"),
    ("forget.answered.low>=.02", "yes"), ("forget.answered.low>=.03", "too few rows to say"),
    ("forget.answered.low>=.17", "no"),
    ("text.perplexity<=30", "yes"), ("text.perplexity.high<=30", "too few rows to say"),  # it has no interval
    ("forget.refused<=1", "not measured"), ("attack.sampling<=1", "not measured"),
])  # fmt: skip
def test_a_bare_name_compares_the_point_and_a_bound_the_interval(text, holds):
    found = check(text)
    assert found.holds == holds
    if holds in ("not measured", "too few rows to say"):
        assert holds in found.why


def test_a_figure_of_no_rows_is_not_measured():
    unread = Rows("harm (unseen)", "forget", [ANSWER] * 9, [NONE] * 9, judged=False)
    assert check("forget.answered<=1", make_report(unread)).holds == "not measured"
    assert plain(rate([]))["high"] == 1.0  # a bound that would be compared, if nobody asked for the rows
    assert check("forget.answered.high<=1", make_report(unread)).holds == "not measured"


def test_the_bound_of_a_bootstrap_of_few_rows_is_too_few_rows():
    """Of one row it would be as narrow as a point."""
    for n, holds in ((3, "too few rows to say"), (12, "yes")):
        report = make_report(Rows("benign (unseen)", "keep", [ANSWER] * n, [ANSWER] * n))
        assert check("keep.all.similarity.low>=0.1", report).holds == holds
        assert check("keep.all.similarity>=0.1", report).holds == "yes", "the point is what it is"
