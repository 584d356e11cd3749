"""The forget side's gradient at changed weights: the changes by hand, and what a run does with them."""

from types import SimpleNamespace

import pytest
import torch
from conftest import one_line_error, run_cli, tiny_model, weights
from test_run import SMALL, data_words

from engine.optimizer import MasterWeightAdamW, OptimizerSettings
from engine.state import TrainingState
from evaluation.attacks.quantisation import rounded_to_bits
from method.perturbed import PerturbedSettings, shaped, towards_worse
from run.perturbed import _changed_weights, refuse_perturbed
from utils import UsageError


def test_rounding_to_bits_by_hand():
    row = torch.tensor([[1.0, 0.4, -0.6, 0.1], [6.0, -2.0, 2.9, 0.0]])
    assert rounded_to_bits(row, 2).tolist() == [[1, 0, -1, 0], [6, 0, 0, 0]]  # -1, 0, 1 times the row's largest
    # 3 bits: -3 to 3 times 2; two inputs a group have a scale of their own
    assert rounded_to_bits(row[1:], 3).tolist() == [[6, -2, 2, 0]]
    assert rounded_to_bits(row[1:], 2, group=2).tolist() == [[6, 0, pytest.approx(2.9), 0]]
    assert rounded_to_bits(torch.zeros(1, 3), 4).tolist() == [[0, 0, 0]]


def test_the_move_towards_a_worse_loss_by_hand():
    some, other, untouched = torch.zeros(1), torch.ones(1), torch.ones(1)
    moved = towards_worse([some, other, untouched], [torch.tensor([3.0]), torch.tensor([-4.0]), None], radius=10)
    assert [w.item() for w in moved] == [6, 1 - 8, 1]  # 3 and 4 are 5 long together
    assert towards_worse([some], [torch.zeros(1)], 10)[0] is some
    assert towards_worse([some], [torch.tensor([torch.inf])], 10)[0] is some


def test_a_gradient_is_masked_by_sign_and_brought_to_a_length_by_hand():
    forget = [torch.tensor([3.0, -2.0, 5.0]), torch.tensor([4.0]), torch.tensor([1.0]), None]
    others = [torch.tensor([0.1, 7.0, 0.0]), torch.tensor([9.0]), None, torch.tensor([1.0])]

    def values(found):
        return [None if gradient is None else gradient.tolist() for gradient in found]

    # one sign with the others: the first of the first weight, and the second weight; what the others hold still is not
    assert values(shaped(forget, others, agreeing=True, norm=0)) == [[3, 0, 0], [4], None, None]
    assert values(shaped(forget, others, agreeing=True, norm=10)) == [[6, 0, 0], [8], None, None]  # 3 and 4 are 5 long
    assert shaped(forget, others, agreeing=False, norm=0) == forget
    nothing = shaped([torch.tensor([1.0])], [torch.tensor([-1.0])], agreeing=True, norm=5)
    assert values(nothing) == [[0]], "of nothing nothing is made"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{"radius": 0.5}, {"bits": 4}, {"radius": 0.5, "bits": 4}])
def test_the_weights_are_put_back_bit_for_bit_and_the_gradient_stays(dtype, settings):
    torch.manual_seed(0)
    model = tiny_model("llama", 64)
    optimizer = MasterWeightAdamW(model, OptimizerSettings(lr=1e-3, total_steps=4), dtype)
    ids = torch.arange(12)[None]

    def backward():
        model(input_ids=ids, labels=ids).loss.backward()

    backward()
    optimizer.step()  # bf16 weights have fp32 rests from now on
    setup = SimpleNamespace(
        recipe=SimpleNamespace(perturbed=PerturbedSettings(**settings)), optimizer=optimizer, model=model
    )
    before = [master.clone() for master in optimizer.snapshot()]
    with _changed_weights(setup, TrainingState(), None, backward):
        moved = torch.cat([(p.detach().float() - m.to(dtype).float()).flatten()
                           for p, m in zip(optimizer.parameters, before, strict=True)])  # fmt: skip
        with torch.no_grad():
            worse = model(input_ids=ids, labels=ids).loss
        backward()
    assert all(torch.equal(m, kept) for m, kept in zip(optimizer.snapshot(), before, strict=True))
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < worse or "radius" not in settings
    assert moved.norm() > 0.1
    if settings == {"radius": 0.5} and dtype == torch.float32:
        assert moved.norm().item() == pytest.approx(0.5, rel=1e-4)
    assert optimizer.grad_norm() > 0


def test_a_run_takes_the_forget_gradient_at_changed_weights_and_saves_its_own(tmp_path, model_folders, data_files):
    words = [f"--model_name={model_folders['llama']}", "--log_file=out.log", *SMALL, *data_words(data_files),
             "--max_unlearn_steps=3", "--save_every=0", "--lr=1e-3"]  # fmt: skip
    found = {}
    for name, settings in {"plain": [], "off": ["perturbed.every=2"], "sam": ["perturbed.radius=0.5"],
                           "bits": ["perturbed.bits=3"], "masked": ["perturbed.agreeing=true"],
                           "short": ["perturbed.norm=1e-3"]}.items():  # fmt: skip
        run = run_cli("unlearn_harm.py", *words, f"--model_save_dir={name}", *(f"--set={s}" for s in settings),
                      cwd=tmp_path)  # fmt: skip
        assert run.returncode == 0, run.stderr
        found[name] = weights(tmp_path / name)
    plain = found["plain"]
    assert all(torch.equal(plain[key], found["off"][key]) for key in plain)
    for name in ("sam", "bits", "masked", "short"):
        change = torch.stack([(plain[key] - found[name][key]).abs().max() for key in plain]).max()
        assert 0 < change < 0.02, name  # another step of the same length, from weights that were put back


@pytest.mark.parametrize(("words", "message"), [
    (["--set=perturbed.bits=4", "--use_lora"], "perturbed.bits: whole weights are rounded, and --use_lora trains none"),
    (["--set=perturbed.bits=9"], "perturbed.bits 9: must be 0, or from 2 to 8"),
])  # fmt: skip
def test_what_cannot_be_changed_is_refused(tmp_path, model_folders, data_files, words, message):
    run = run_cli("unlearn_harm.py", f"--model_name={model_folders['llama']}", "--model_save_dir=out",
                  "--log_file=out.log", *SMALL, *data_words(data_files), *words, cwd=tmp_path, quiet=True)  # fmt: skip
    assert message in one_line_error(run)
    with pytest.raises(UsageError, match="perturbed: weights and gradients are changed whole: leave --shard out"):
        refuse_perturbed(SimpleNamespace(perturbed=PerturbedSettings(radius=0.1)),
                         SimpleNamespace(shard=True, use_lora=False))  # fmt: skip
