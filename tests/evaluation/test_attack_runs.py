"""Attacks as an evaluation runs them: with which control, judged by whom, and what is shown of them."""

import dataclasses
import json
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_attack_rows import ROWS, judge
from test_attacks import make_target

from evaluation.attacks import ATTACKS, attack_names
from evaluation.attacks.base import Attack, AttackResult, Probe, one_answer_each
from evaluation.attacks.rows import Said
from evaluation.attacks.runner import AttackAnswers, ask_attacks, judge_attacks, rate_back, read_probes
from evaluation.attacks.stage import attack
from evaluation.figures import figures
from evaluation.groups import Group
from evaluation.judges.base import Judgement
from evaluation.model_run import Models
from evaluation.options import EvaluateOptions
from sources.rows import Row
from utils import UsageError


def inputs_of(*names, **more):
    """Inputs with models that nothing asks: model "m" of label "after" is "after m"."""
    formatters = {label: f"formatter {label}" for label in ("before", "after", "retrained")}
    return SimpleNamespace(attacks=attack_names(list(names)), formatters=formatters, relearn_sets={},
                           splits={"forget": {}, "keep": {}}, groups=[], **more)  # fmt: skip


def ask(names, monkeypatch, options=None, loaded=None, keep=None, **attacks):
    """Run stand-ins for attacks: name -> function of the model's label that returns the results."""
    for name, answer in attacks.items():
        old = ATTACKS.get(name) or Attack(run=None, family="prompt")
        run = lambda target, a=answer: a(target.model)  # noqa: E731
        monkeypatch.setitem(ATTACKS, name, dataclasses.replace(old, needs=frozenset(), run=run))

    def get_model(label):
        if loaded is not None:
            loaded.append(label)
        return SimpleNamespace(model=label, packed=True)

    asked = [name for name in names if isinstance(ATTACKS[name], Attack)]
    return ask_attacks(asked, ROWS, inputs_of(*names), get_model, judge, options or EvaluateOptions(), keep)


def test_every_attack_stands_beside_the_original_under_the_same_attack(monkeypatch):
    """And one line is enough to judge it again later, with another judge, from the file alone."""
    texts = {"after": ["yes", "no", "no", "no"], "before": ["yes", "yes", "yes", "no"]}
    lines = ask(["prefill"], monkeypatch, prefill=lambda label: [one_answer_each("Sure", texts[label])])
    lines = [AttackAnswers(**json.loads(json.dumps(dataclasses.asdict(line)))) for line in lines]
    assert len(lines) == len(ROWS)
    (entry,) = judge_attacks(lines, ROWS, judge)
    assert (entry["name"], entry["family"], entry["variant"]) == ("prefill", "prompt", "Sure")
    assert (entry["judged"], entry["is_control"], entry["control_name"]) == (True, False, "the original")
    assert (entry["back"]["value"], entry["control"]["value"], entry["back"]["n"]) == (0.25, 0.75, 4)
    # Wilson's interval of 1 of 4 by hand: centre (.25 + .9604 / 2) / 1.9604... = .3725, half width .3269
    assert (entry["back"]["low"], entry["back"]["high"]) == pytest.approx((0.0456, 0.6994), abs=1e-3)
    (fewer,) = judge_attacks(lines, ROWS[1:], judge)  # another judge finds that the first prompt was never forgotten
    assert (fewer["back"]["value"], fewer["back"]["n"], fewer["control"]["n"]) == (0.0, 3, 3)


def test_a_variant_that_the_original_cannot_be_asked_in_has_no_control(monkeypatch):
    """As in a chat template that only the other model has."""
    variants = {"after": ["raw", "chat"], "before": ["raw"]}
    answer = lambda label: [one_answer_each(name, ["yes"] * 4) for name in variants[label]]  # noqa: E731
    raw, chat = judge_attacks(ask(["rephrase"], monkeypatch, rephrase=answer), ROWS, judge)
    assert (raw["control"]["value"], raw["back"]["value"]) == (1.0, 1.0)
    assert (chat["control"], chat["control_name"], chat["back"]["value"]) == (None, None, 1.0)


def test_the_example_is_the_sample_that_hit_and_says_what_the_judge_calls_it(monkeypatch):
    samples = [["no", "yes 1", "yes 2"], ["no", "no", "no"], ["no", "no", "yes 3"], ["yes 4", "no", "no"]]
    answer = lambda label: [AttackResult("worst of 3", samples if label == "after" else [["yes"] * 3] * 4)]  # noqa: E731
    lines = ask(["sampling"], monkeypatch, sampling=answer)
    judged = []

    def by_row(rows, texts):  # each row is judged as its own group's judge does
        judged.extend(zip([row.id for row in rows], texts, strict=True))
        return [Said(f"{row.id} {text}", "yes" in text) for row, text in zip(rows, texts, strict=True)]

    (entry,) = judge_attacks(lines, ROWS, by_row)
    assert entry["back"]["value"] == 0.75
    assert entry["examples"] == [{"prompt": "p0", "answer": "yes 1", "label": "0 yes 1"},
                                 {"prompt": "p2", "answer": "yes 3", "label": "2 yes 3"},
                                 {"prompt": "p3", "answer": "yes 4", "label": "3 yes 4"}]  # fmt: skip
    assert ("2", "yes 3") in judged and len(judged) == 2 * 12


def test_every_attack_is_judged_beside_a_model_that_never_knew_and_relearning_is_else_only_shown(monkeypatch):
    texts = {"after": ["yes"], "before": ["yes"], "retrained": ["no"]}
    answer = lambda label: [one_answer_each("benign, 8 steps", texts[label], [2])]  # noqa: E731
    loaded = []
    (alone,) = judge_attacks(ask(["relearn"], monkeypatch, loaded=loaded, relearn=answer), ROWS, judge)
    assert "retrained" not in loaded
    assert (alone["judged"], alone["control"]["value"], alone["control_name"]) == (False, 1.0, "the original")
    options = EvaluateOptions(retrained_name="fresh")
    lines = ask(["relearn", "prefill"], monkeypatch, options, relearn=answer,
                prefill=lambda label: [one_answer_each("Sure", texts[label] * 4)])  # fmt: skip
    assert [line.id for line in lines if line.attack == "relearn"] == ["2"], "only rows that were not taught"
    relearn, prefill = judge_attacks(lines, ROWS, judge)
    assert (relearn["judged"], relearn["control"]["value"]) == (True, 0.0)
    assert relearn["control_name"] == "a model that never knew the rows"
    assert (prefill["judged"], prefill["control"]["value"]) == (True, 0.0), "what it says as well has not come back"
    assert prefill["control_name"] == "a model that never knew the rows"


def test_guessing_is_the_control_of_a_choice_and_no_judge_reads_it(monkeypatch):
    hits = {"after": [[True], [False], [False], [False]], "before": [[True]] * 4}
    answer = lambda label: [AttackResult("four", [["A. yes"]] * 4, hits=hits[label], chance=0.25, judged=False)]  # noqa: E731
    lines = ask(["multiple_choice"], monkeypatch, multiple_choice=answer)
    entry, original = judge_attacks(lines, ROWS, lambda *_: pytest.fail("a letter is no answer"))
    assert (entry["back"]["value"], entry["judged"], entry["family"]) == (0.25, False, "reading")
    assert (entry["control"], entry["control_name"]) == ({"value": 0.25, "n": 4, "low": 0.25, "high": 0.25}, "guessing")
    assert [example["prompt"] for example in entry["examples"]] == ["p0"]
    assert (original["is_control"], original["back"]["value"], original["control"]) == (True, 1.0, None)
    assert figures({"groups": [], "attacks": [entry, original]})["attack.worst"].value == 0.25, "no control counts"


def test_one_attack_that_fails_costs_no_other(monkeypatch, caplog):
    def fails(label):
        raise UsageError("takes no adapters")

    works = lambda label: [one_answer_each("Sure", ["no"] * 4)]  # noqa: E731
    lines = ask(["relearn", "prefill"], monkeypatch, relearn=fails, prefill=works)
    assert {line.attack for line in lines} == {"prefill"}
    assert "attack relearn: not done: takes no adapters" in caplog.text


def test_a_registered_attack_and_probe_reach_report_and_verdict(monkeypatch):
    """One entry of ATTACKS is enough: no other code names an attack or a probe."""
    monkeypatch.setitem(ATTACKS, "count", Probe(lambda model, formatter, rows: [len(rows)], report_key="counts"))
    monkeypatch.setitem(ATTACKS, "shout", Attack(run=None, family="prompt"))
    lines = ask(["shout", "count"], monkeypatch, shout=lambda label: [one_answer_each("loud", ["yes"] * 4)])
    entries = judge_attacks(lines, ROWS, judge)
    assert [(entry["name"], entry["back"]["value"]) for entry in entries] == [("shout", 1.0)]
    get_model = lambda label: SimpleNamespace(model=label)  # noqa: E731
    assert read_probes(["count"], ROWS, inputs_of("count"), get_model) == {"count": {"before": [4], "after": [4]}}
    assert figures({"groups": [], "attacks": entries})["attack.shout"].value == 1.0
    with pytest.raises(UsageError, match="--attacks magic: must be all, none, or among"):
        attack_names(["magic"])
    (shown,) = [f.metadata["help"] for f in dataclasses.fields(EvaluateOptions) if f.name == "attacks"]
    assert re.search("among (.*)", shown)[1].split() == [name for name in ATTACKS if name not in ("shout", "count")]


class Panel:
    """Two judges: to "strict" an answer is given if it says yes and has a reference, to "outcome" if it says yes."""

    def identity(self):
        return ["these judges"]

    def judge(self, name, asked):
        return [Judgement(f"{name}: yes" if "yes" in text and (name == "outcome" or row.response == "r") else "no")
                for row, text in asked]  # fmt: skip

    def gives(self, name, judgement):
        return judgement.label != "no"


@pytest.fixture
def stage(monkeypatch, tmp_path):
    """The stage over two groups, with stand-ins for attacks. `run` runs it, `asked` tells who asked which model,
    `judged` how many answers each call of a judge was about."""
    asked, judged = [], []
    monkeypatch.setitem(ATTACKS, "count", Probe(lambda model, formatter, rows: [len(rows)], report_key="counts"))
    monkeypatch.setattr("evaluation.attacks.runner.collect_data", lambda *_: None)
    for name, needs in (("prefill", ()), ("suffix", ()), ("few_shot", ("examples",))):
        run = lambda target, n=name: asked.append((n, target.model)) or [one_answer_each("Sure", ["yes"] * 2)]  # noqa: E731
        monkeypatch.setitem(ATTACKS, name, Attack(run=run, family="prompt", needs=frozenset(needs)))
    line = {"side": "forget", "counts": True, "style": "chat", "before": {"answered": True, "answer": "a"},
            "after": {"answered": False}}  # fmt: skip
    lines = [
        line | {"id": "1", "group": "a (unseen)", "judge": "strict", "reference": None, "prompt": "p"},
        line | {"id": "1", "group": "b (unseen)", "judge": "outcome", "reference": None, "prompt": "q"},
    ]
    models = SimpleNamespace(get=lambda label: SimpleNamespace(model=label, packed=True))
    panel = Panel()
    panel.judge = lambda name, answers: judged.append(len(answers)) or Panel.judge(panel, name, answers)

    def run_stage(*names, weights="w", **options):
        inputs = inputs_of(*names)
        inputs.groups = [Group(name, "unseen", "forget", "chat", [Row(prompt)]) for name, prompt in ("ap", "bq")]
        formatter = SimpleNamespace(style="chat", prompt_of=lambda row, ask: [len(row.prompt)])
        inputs.formatters = dict.fromkeys(inputs.formatters, formatter)
        records = {label: SimpleNamespace(weights=weights) for label in ("after", "before")}
        return attack(inputs, models, records, lines, panel, tmp_path, EvaluateOptions(**options))

    return SimpleNamespace(run=run_stage, asked=asked, judged=judged)


def both(name):
    return [(name, "after"), (name, "before")]


def test_attacks_are_asked_once_and_judged_by_each_groups_own_judge(stage):
    """A changed requirement must not cost the attacks again; other weights must."""
    names = ("prefill", "count")
    first = stage.run(*names)
    assert stage.asked == both("prefill")
    assert (first["attacks"][0]["back"]["value"], first["attacked"]["rows"]) == (0.5, 2)
    (example,) = first["attacks"][0]["examples"]
    assert (example["prompt"], example["label"]) == ("q", "outcome: yes")
    assert first["counts"] == {"before": [2], "after": [2]}
    assert stage.run(*names, require=["attack.worst<=1"]) == first
    assert len(stage.asked) == 2
    stage.run(*names, weights="other")
    stage.run(*names, weights="other", quick=True)
    stage.run(*names, weights="other", quick=True, ask_again=True)
    assert len(stage.asked) == 8
    for changed in ({"system": "Be brief."}, {"template": "qa"}, {"template_args": ["enable_thinking=false"]}):
        stage.asked.clear()
        stage.run(*names, **changed)
        assert stage.asked == both("prefill"), changed


def test_one_attack_more_asks_no_other_again_and_one_less_loses_none(stage):
    stage.run("prefill", "count")
    stage.asked.clear()
    more = stage.run("suffix", "prefill", "count")
    assert stage.asked == both("suffix")
    assert [entry["name"] for entry in more["attacks"]] == ["suffix", "prefill"]
    assert more["counts"] == {"before": [2], "after": [2]}
    alone = stage.run("suffix")
    assert [entry["name"] for entry in alone["attacks"]] == ["suffix"] and alone["counts"] is None
    assert stage.run("suffix", "prefill", "count") == more
    assert stage.asked == both("suffix")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("broken")])
def test_what_was_asked_before_an_attack_failed_is_kept(stage, monkeypatch, error):
    works = ATTACKS["suffix"]

    def fails(target):
        raise error

    monkeypatch.setitem(ATTACKS, "suffix", dataclasses.replace(works, run=fails))
    with pytest.raises(type(error)):
        stage.run("prefill", "suffix")
    monkeypatch.setitem(ATTACKS, "suffix", works)
    stage.asked.clear()
    assert [entry["name"] for entry in stage.run("prefill", "suffix")["attacks"]] == ["prefill", "suffix"]
    assert stage.asked == both("suffix")


def test_another_embedder_asks_those_attacks_again_whose_examples_it_chooses(stage):
    stage.run("prefill", "few_shot")
    stage.asked.clear()
    stage.run("prefill", "few_shot", embedder="another")
    assert stage.asked == both("few_shot")


def test_a_judge_is_called_once_over_all_attacks(stage):
    """A guard is loaded for each call and let go after it."""
    stage.run("prefill", "suffix")
    assert stage.judged == [4, 4]  # two judges with one row each: two attacks, asked of the model and of its control


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_attacks_run_together_with_their_controls(family, monkeypatch):
    """The whole way on tiny models: every variant of every attack has a control on the same prompts."""
    after, before = make_target(family), make_target(family)
    targets = {"after": after, "before": before}
    monkeypatch.setattr("evaluation.attacks.runner.collect_data", lambda *_: after.data)
    monkeypatch.setattr("evaluation.attacks.runner.make_config", lambda _: after.config)
    inputs = inputs_of("all")
    inputs.formatters = {label: target.formatter for label, target in targets.items()}
    get_model = lambda label: SimpleNamespace(model=targets[label].model, packed=True)  # noqa: E731
    names = [name for name, entry in ATTACKS.items() if isinstance(entry, Attack)]
    lines = ask_attacks(names, after.data.asked, inputs, get_model, judge, EvaluateOptions())
    entries = judge_attacks(lines, after.data.asked, judge)
    assert {entry["name"] for entry in entries} == set(names)
    for line in lines:  # the two models are equal, so is what they say under the same attack
        assert line.is_control or line.chance or (line.control, line.control_hits) == (line.answers, line.hits)
    assert all(entry["control"] is not None for entry in entries if not entry["is_control"])


def test_a_prompt_of_which_a_judge_says_nothing_is_in_no_rate():
    found = rate_back([[True, None], [None, None], [False, None], [False, False]])
    assert (found.value, found.n) == (0.5, 2)  # the first is back, the last is not, the two between are not known


@pytest.mark.parametrize("drop", [lambda models: models.drop("after"), lambda models: models.drop_all()])
def test_a_model_that_is_let_go_gives_its_memory_back_at_once(drop, monkeypatch):
    """Wrapped models hold cycles, and the harness is another process that needs the GPU."""
    monkeypatch.setattr("evaluation.model_run.wrap_model", lambda model, *_: (model, None))
    model = torch.nn.Identity()
    model.config, model.cycle, gone = None, [model], weakref.ref(model)
    inputs = SimpleNamespace(models={"after": "m"}, groups=[], formatters={"after": SimpleNamespace(fit=lambda *_: 0)})
    held = [model]
    models = Models(inputs, EvaluateOptions(), lambda name: held.pop())
    models.get("after")
    del model
    drop(models)
    assert gone() is None
