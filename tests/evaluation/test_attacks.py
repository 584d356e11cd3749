"""Attacks on tiny models: each gives an answer a prompt, and does to weights and prompts what it says."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from engine.trained_on import TrainedOn
from evaluation.attacks import ATTACKS, WRAPPERS, attack_names, runner
from evaluation.attacks.base import Attack, AttackConfig, AttackData, AttackResult, AttackTarget, Probe
from evaluation.attacks.logit_lens import logit_lens_nll
from evaluation.attacks.prompts import few_shot
from evaluation.attacks.quantisation import fake_quantize
from evaluation.attacks.relearning import fine_tune
from evaluation.attacks.runner import run_attacks
from evaluation.options import EvaluateOptions
from prompts.formatter import PromptFormatter
from sources.rows import Row
from utils import UsageError


@pytest.fixture(params=["opt", "llama"])
def target(request):
    tokenizer = make_tokenizer("opt" if request.param == "opt" else "chat")
    model = tiny_model(request.param, len(tokenizer)).eval()
    rows = [Row(f"How do I open lock {i}?", f"Take the red pick {i}.") for i in range(3)]
    shots = [Row(f"How do I open door {i}?", f"Kick it {i} times.") for i in range(4)]
    original = copy.deepcopy(model)
    formatter = PromptFormatter(tokenizer, "auto", 512, 16)
    data = AttackData(rows=rows, forget_train_rows=shots, benign_rows=shots[:2], borderline_rows=[])
    config = AttackConfig(max_new_tokens=5, batch_size=8, seed=1, num_samples=3, relearn_steps=8, num_relearn_rows=4,
                          relearn_lr=1e-3)  # fmt: skip
    return AttackTarget(model=model, original=original, formatter=formatter, packed=True, data=data, config=config)


def test_every_attack_answers_every_prompt(target):
    counts = {"quantise": (2, 1), "prefill": (3, 1), "few_shot": (1, 1), "sampling": (1, 3),
              "rephrase": (len(WRAPPERS) + (3 if target.formatter.style == "chat" else 2), 1),
              "relearn": (7, 1)}  # two kinds of rows (none borderline), three steps each, and the control  # fmt: skip
    assert set(counts) == {name for name, attack in ATTACKS.items() if isinstance(attack, Attack)}
    before = {name: tensor.clone() for name, tensor in target.model.state_dict().items()}
    for name, (variants, answers) in counts.items():
        found = ATTACKS[name].run(target)
        assert len({a.variant for a in found}) == variants, name
        assert all(len(a.answers) == 3 and all(len(texts) == answers for texts in a.answers) for a in found), name
    after = target.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "an attack must leave the model as it was"


def test_few_shots_stand_before_the_prompt(target):
    asked = []
    target.answer = lambda prompts: asked.extend(prompts) or ["" for _ in prompts]
    few_shot(target)
    text = target.formatter.tokenizer.decode(asked[0])
    places = [text.index(part) for part in ("door 0", "Kick it 0", "door 1", "Kick it 1", "lock 0")]
    assert places == sorted(places)


def test_relearning_lowers_the_loss_on_its_rows(target):
    def loss(model):
        return logit_lens_nll(model, target.formatter, target.data.forget_train_rows)[-1]

    start, rows = loss(target.model), target.data.forget_train_rows
    answered = ((step, loss(model)) for step, model in fine_tune(target, target.model, rows, 8))
    steps, losses = zip(*answered, strict=True)
    assert steps == (2, 4, 8)
    assert start > losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("target", ["llama"], indirect=True)  # its tokenizer serves all three
@pytest.mark.parametrize("family", ["mamba", "mixtral", "gpt_neox"])
def test_every_family_can_be_taught_again_and_is_left_as_it_was(target, family):
    """Also in bf16, whose weights would lose most of a small change: what answers is the model with its adapters."""
    model = tiny_model(family, len(target.formatter.tokenizer)).bfloat16().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target.packed, target.config.relearn_lr = False, 1e-2
    losses = [logit_lens_nll(model, target.formatter, target.data.forget_train_rows)]
    for _, tuned in fine_tune(target, model, target.data.forget_train_rows, 8):
        losses.append(logit_lens_nll(tuned, target.formatter, target.data.forget_train_rows))
        weights = dict(tuned.named_parameters())
        names = [name for name in weights if "lora_B" in name]
        assert names
        assert all(weights[name].abs().sum() > 0 for name in names), "an adapter that learned nothing"
        assert family != "mixtral" or any("experts" in name for name in names)
    assert losses[0][-1] > losses[-1][-1]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_quantised_weights_lie_on_their_grid(target):
    for bits in (8, 4):
        changed = fake_quantize(target.model, bits)
        name = "model.decoder.layers.0.fc1" if target.formatter.style == "qa" else "model.layers.0.mlp.up_proj"
        old, new = target.model.get_submodule(name).weight, changed.get_submodule(name).weight
        assert not torch.equal(old, new)
        step = old.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)  # one scale a row: 32 inputs, below the group
        assert ((new - old).abs() <= step / 2 + 1e-6).all()
        assert all(len(row.unique()) <= 2**bits - 1 for row in new)
        assert torch.equal(changed.get_output_embeddings().weight, target.model.get_output_embeddings().weight)


def test_weights_that_are_no_linear_layers_are_quantised_too():
    """GPT-2 keeps its matrices the other way round, a mixture its experts' in one tensor: left as they are, the attack
    would have attacked nothing."""
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=16))
    mixture = MixtralForCausalLM(MixtralConfig(**small, num_key_value_heads=2, num_local_experts=2))
    matrices = ("mlp.c_fc.weight", "experts.gate_up_proj", "q_proj.weight")
    for model in (gpt2, mixture):
        kept, changed = dict(model.named_parameters()), dict(fake_quantize(model, 4).named_parameters())
        for name in (full for full in kept if full.endswith(matrices)):
            rows, old = (w.mT if model is gpt2 else w for w in (changed[name], kept[name]))  # (..., out, in)
            assert not torch.equal(rows, old)
            assert all(len(row.unique()) <= 15 for row in rows.flatten(0, -2)), "one scale an output, 15 steps"
        for name in kept:
            same = any(part in name for part in ("wte", "wpe", "embed", "lm_head", "norm", "ln_", "bias"))
            assert torch.equal(kept[name], changed[name]) == same, name


def attack_inputs(names: list[str], splits: dict):
    """(inputs, runs) of `run_attacks`, with models that nothing asks."""
    formatters = {label: SimpleNamespace(style="chat") for label in ("before", "after")}
    run = SimpleNamespace(answer_model=SimpleNamespace(model=None, packed=True))
    return SimpleNamespace(attacks=names, splits=splits, formatters=formatters), {"before": run, "after": run}


def test_the_control_of_relearning_is_not_taken_for_an_attack(monkeypatch):
    """What the never-unlearned model still answers says nothing against the unlearned one."""
    made = [AttackResult("benign rows, 8 steps", [["no"]]),
            AttackResult("never unlearned", [["yes"]], is_control=True)]  # fmt: skip
    monkeypatch.setitem(ATTACKS, "relearn", Attack(lambda target: made, needs_examples=True))
    monkeypatch.setattr(runner, "generate", lambda *_, **__: [])
    side = {"side": "forget", "counts": True, "group": "a (unseen)", "style": "chat", "prompt": "p"}
    lines = [{**side, "before": {"on_topic": True, "answer": "a"}, "after": {"on_topic": False}}]
    inputs, runs = attack_inputs(["relearn"], {"forget": {}, "keep": {}})
    embed = lambda texts: torch.tensor([[float(text != "no")] for text in texts])  # noqa: E731
    found, _ = run_attacks(inputs, runs, lines, embed, EvaluateOptions())
    assert [a["name"] for a in found] == ["relearn", "control"]
    assert [a["back"]["value"] for a in found] == [0.0, 1.0]


def test_only_what_was_trained_on_is_taught_back_and_one_attack_that_fails_costs_no_other(monkeypatch, tmp_path):
    """Rows of the training split that no step came to were never forgotten."""
    taught = []

    def relearn(target):
        taught.extend(row.prompt for row in target.data.forget_train_rows)
        raise UsageError("takes no adapters")

    monkeypatch.setitem(ATTACKS, "relearn", Attack(relearn, needs_examples=True))
    monkeypatch.setitem(ATTACKS, "prefill", Attack(lambda target: [AttackResult("Sure", [["no"]])]))
    asked = [Row(f"trained {i}", "An answer.") for i in range(3)]
    never = [Row(f"never {i}", "An answer.") for i in range(3)]
    TrainedOn().with_run({"forget": [row.key for row in asked], "normal": []}).write(tmp_path)
    line = {"side": "forget", "counts": True, "group": "a (unseen)", "style": "chat", "prompt": "p",
            "before": {"on_topic": True, "answer": "a"}, "after": {"on_topic": False}}  # fmt: skip
    shown = {**line, "counts": False, "group": "published prompt", "prompt": "only shown"}
    inputs, runs = attack_inputs(["relearn", "prefill"], {"forget": {"a": {"train": asked + never}}, "keep": {}})
    embed = lambda texts: torch.ones(len(texts), 1)  # noqa: E731
    found, _ = run_attacks(inputs, runs, [line, shown], embed, EvaluateOptions(model_name=str(tmp_path)))
    assert sorted(taught) == ["trained 0", "trained 1", "trained 2"]
    assert [(a["name"], a["back"]["n"]) for a in found] == [("prefill", 1)]


def test_a_registered_attack_and_probe_reach_the_report(monkeypatch):
    """One entry of ATTACKS is enough: no other code names an attack or a probe."""
    monkeypatch.setitem(ATTACKS, "shout", Attack(lambda target: [AttackResult("loud", [["yes"]])]))
    monkeypatch.setitem(ATTACKS, "count", Probe(lambda model, formatter, rows: [len(rows)], report_key="counts"))
    line = {"side": "forget", "counts": True, "group": "a (unseen)", "style": "chat", "prompt": "p",
            "before": {"on_topic": True, "answer": "a"}, "after": {"on_topic": False}}  # fmt: skip
    inputs, runs = attack_inputs(attack_names(["shout", "count"]), {"forget": {}, "keep": {}})
    entries, findings = run_attacks(inputs, runs, [line], lambda texts: torch.ones(len(texts), 1), EvaluateOptions())
    assert [(entry["name"], entry["back"]["value"]) for entry in entries] == [("shout", 1.0)]
    assert findings == {"layers": None, "counts": {"before": [1], "after": [1]}}
    with pytest.raises(UsageError, match="--attacks magic: must be all, none, or among"):
        attack_names(["magic"])
