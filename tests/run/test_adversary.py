"""MUDMAN's adversary: its factors by hand and beside torch's own Adam, and what a run does with it and keeps of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import one_line_error, run_cli, tiny_model, weights
from test_run import SMALL, data_words, events

import run.adversary
import run.perturbed
from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.state import TrainingState
from method.adversary import fork, laid_over, learn
from method.perturbed import PerturbedSettings
from method.step import PreparedStep, StepSums
from run.adversary import taught
from run.perturbed import refuse_perturbed, step_gradients
from utils import UsageError

RELEARNED, FORGET = (PreparedStep([], {"rows": 1}) for _ in range(2))
STEP = PreparedStep([], {"rows": 1}, forget=FORGET, relearned=RELEARNED)


class OneWeight(torch.nn.Module):
    """A model of one trained weight, a matrix (1, 1) of 1; its head is frozen."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        self.layer.weight.data.fill_(1.0)
        self.head.requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


def setup_of(monkeypatch, **settings):
    """A run of that weight w, and where each gradient was taken: NLL (w - 3)^2 / 2 of the forget rows, which is to
    rise, and (w - 0.4)^2 / 2 of the others."""
    model, seen = OneWeight(), []
    optimizer = MasterWeightAdamW(model, OptimizerSettings(lr=0.1, total_steps=9, max_grad_norm=9.0), torch.float32)

    def gradients(prepared, terms, *_, **__):
        w, kind = model.layer.weight, {id(RELEARNED): "relearned", id(FORGET): "forget"}.get(id(prepared), "others")
        seen.append((kind, pytest.approx(w.item())))
        slope = {"relearned": w.item() - 3, "forget": 3 - w.item(), "others": w.item() - 0.4}[kind]
        w.grad = torch.full((1, 1), slope) + (0 if w.grad is None else w.grad)
        return StepSums(torch.zeros(5), ["forget"])

    for module in (run.adversary, run.perturbed):
        monkeypatch.setattr(module, "compute_gradients", gradients)
    return SimpleNamespace(
        model=model, optimizer=optimizer, wrapped=None, accelerator=None, graphs=None,
        options=SimpleNamespace(seed=1, shard=False),
        recipe=SimpleNamespace(terms=[], adversary="its term", perturbed=PerturbedSettings(
            **{"adversary_steps": 1, "adversary_lr": 0.1, "adversary_rank": 1} | settings)),
    ), seen  # fmt: skip


def beginning(left: float, right: float) -> TrainingState:
    """The state of a run whose adversary has not learned yet."""
    state = torch.zeros(3, 2, 1)
    state[0, :, 0] = torch.tensor([left, right])
    return TrainingState(adversary=[state])


def test_the_adversary_learns_and_the_forget_gradient_is_taken_at_it_by_hand(monkeypatch):
    """w = 1, L = 0, R = 1/2. NLL's slope at 1 is -2: L's is -2 R = -1, R's is -2 L = 0. Adam's first step moves L by
    its rate against the sign and leaves R: the adversary is 1 + 0.1 / 2. There the forget loss has the slope 1.95."""
    setup, seen = setup_of(monkeypatch)
    state, w = beginning(0.0, 0.5), setup.model.layer.weight
    step_gradients(setup, STEP, state, signalled=False)
    assert seen == [("relearned", 1.0), ("forget", 1.05), ("others", 1.0)]
    assert state.adversary[0][0].flatten().tolist() == pytest.approx([0.1, 0.5])
    assert w.item() == 1.0, "its own steps leave the weights alone"
    assert w.grad.item() == pytest.approx(1.95 + 0.6), "what it learned by is no part of the step's gradient"
    setup.optimizer.step()  # to 0.9, and the adversary lies over it: 0.95
    seen.clear()
    step_gradients(setup, STEP, state, signalled=False)
    assert seen[0] == ("relearned", 0.95) and state.adversary_turns == 2
    assert list(setup.model.state_dict()) == ["layer.weight", "head.weight"], "what is saved knows nothing of it"


def test_masking_and_the_move_of_sam_come_after_it_by_hand(monkeypatch):
    """The others' slope is .6. At the adversary the forget slope is 1.95: one sign, so it stays, brought to 2. SAM
    moves the adversary by its radius, and what is masked is the slope there: 3 - 4.05 has the other sign."""
    setup, seen = setup_of(monkeypatch, agreeing=True, norm=2.0)
    step_gradients(setup, STEP, beginning(0.0, 0.5), signalled=False)
    assert setup.model.layer.weight.grad.item() == pytest.approx(2 + 0.6)
    setup, seen = setup_of(monkeypatch, agreeing=True, radius=3.0)
    step_gradients(setup, STEP, beginning(0.0, 0.5), signalled=False)
    assert seen == [("relearned", 1.0), ("forget", 1.05), ("forget", 4.05), ("others", 1.0)]
    assert setup.model.layer.weight.grad.item() == pytest.approx(0.6)
    assert setup.model.layer.weight.item() == 1.0


def test_it_begins_anew_from_the_weights_as_they_are(monkeypatch):
    setup, seen = setup_of(monkeypatch, adversary_steps=2, adversary_turns=2)
    state = TrainingState()
    for step in range(3):
        state.step = step
        taught(setup, state, setup.optimizer.snapshot(), RELEARNED)
        setup.optimizer.restore([torch.ones(1, 1)])
    places = [place.expected for _, place in seen]
    assert places[0] == places[4] == 1.0 and places[:4] == sorted(set(places[:4])), "towards 3, then from 1 again"
    assert state.adversary_turns == 1
    state.adversary[0][0].fill_(math.inf)
    kept = setup.optimizer.snapshot()
    assert taught(setup, state, kept, RELEARNED) is kept, "one that has run away is dropped"
    assert state.adversary is None and setup.model.layer.weight.item() == 1.0


@pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
def test_its_steps_are_those_of_torchs_adam_on_the_factors_themselves(shape):
    """Worked out from the gradient of the whole weights, for a matrix and for experts that are stacked."""
    generator = torch.Generator().manual_seed(0)
    aim, inputs = torch.randn(shape, generator=generator), torch.randn(*shape[:-2], 5, 3, generator=generator)
    base, other = torch.randn(shape, generator=generator), torch.ones(4)
    found = fork([base, other], [True, False], 2, generator)
    assert all(torch.equal(a, b) for a, b in zip(laid_over([base, other], found), [base, other], strict=True))
    assert 0 < found[0][0].abs().max() <= 3**-0.5
    left, right = (factor.clone().requires_grad_() for factor in found[0][0].split([4, 3], dim=-2))
    adam = torch.optim.Adam([left, right], lr=0.03)

    def loss(weight):
        return (inputs @ (weight - aim).mT).square().mean()

    for done in range(4):
        adam.zero_grad()
        loss(base + left @ right.mT).backward()
        adam.step()
        weight = laid_over([base, other], found)[0].requires_grad_()
        loss(weight).backward()
        learn(found, [weight.grad, torch.ones(4)], 0.03, done)
    torch.testing.assert_close(found[0][0], torch.cat([left, right], dim=-2).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", [[], ["--use_lora"]])
def test_a_run_forgets_against_an_adversary_that_it_does_not_save(tmp_path, model_folders, data_files, words):
    words = [f"--model_name={model_folders['llama']}", *SMALL, *data_words(data_files), *words, "--save_every=0",
             "--max_unlearn_steps=3", "--method=yao", "--lr=1e-3"]  # fmt: skip
    found, losses = {}, {}
    for name, settings in {
        "plain": [],
        "strong": ["perturbed.adversary_steps=4", "perturbed.adversary_lr=0.03"],
    }.items():
        run = run_cli("unlearn_harm.py", *words, f"--model_save_dir={name}", f"--log_file={name}.log",
                      *(f"--set={s}" for s in settings), cwd=tmp_path)  # fmt: skip
        assert run.returncode == 0, run.stderr
        found[name] = weights(tmp_path / name)
        losses[name] = [event["bad_loss"] for event in events(tmp_path / f"{name}.jsonl", "step")]
    assert losses["strong"][0] < losses["plain"][0] - 0.1, "it has learned the rows whose answers are measured at it"
    assert {k: w.shape for k, w in found["strong"].items()} == {k: w.shape for k, w in found["plain"].items()}
    files = [sorted(file.name for file in (tmp_path / name).rglob("*")) for name in found]
    assert files[0] == files[1]
    change = max((found["plain"][key] - found["strong"][key]).abs().max() for key in found["plain"])
    assert 0 < change < 0.02, "steps of the run's rate, and none of the adversary's"


def test_where_there_is_nothing_for_it_to_learn_in_it_is_refused(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['llama']}", "--model_save_dir=out", "--log_file=out.log", *SMALL,
             *data_words(data_files), "--set=perturbed.adversary_steps=1"]  # fmt: skip
    run = run_cli("unlearn_harm.py", *words, "--set=trainable.parameters=norm", cwd=tmp_path, quiet=True)
    assert "perturbed.adversary_steps: the adversary lies over the trained matrices" in one_line_error(run)
    with pytest.raises(UsageError, match="perturbed: weights and gradients are changed whole: leave --shard out"):
        refuse_perturbed(SimpleNamespace(perturbed=PerturbedSettings(adversary_steps=1)),
                         SimpleNamespace(shard=True, use_lora=False))  # fmt: skip


def test_it_lies_over_the_matrices_of_the_layers_alone():
    model = tiny_model("llama", 64)
    optimizer = MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=4), torch.float32)
    chosen = run.adversary._chosen(SimpleNamespace(model=model, optimizer=optimizer))
    names = [name for has, (name, *_) in zip(chosen, optimizer.names, strict=True) if has]
    assert len(names) == 7 * model.config.num_hidden_layers and all("_proj" in name for name in names)
