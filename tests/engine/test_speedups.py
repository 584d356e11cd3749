"""What is done otherwise than torch would gives torch's own numbers."""

import copy

import pytest
import torch
from conftest import tiny_model
from test_tree import PAD, some_sequences

from engine.speedups import NAME, speed_up
from engine.tree import AnswerLogitsModel, packed_batch
from method.losses import token_nll


def loss_and_gradients(model):
    batch = packed_batch(some_sequences(4), 60, PAD)
    token_nll(AnswerLogitsModel(model, packed=True)(batch), batch.target_to_logit, batch.targets).mean().backward()
    return {name: parameter.grad.float() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox", "qwen2", "gemma"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_the_plain_model(family, frozen):
    """Tied and untied heads, grouped keys, embeddings that are scaled after they are looked up (Gemma), and one whose
    padding row (a token that occurs) gets no gradient."""
    plain = tiny_model(family)
    plain.get_input_embeddings().padding_idx = some_sequences(4)[0].prompt_ids[0]
    plain.get_input_embeddings().weight.requires_grad_(not frozen)
    faster = copy.deepcopy(plain)
    speed_up(faster)
    assert faster.config._attn_implementation == NAME
    wanted = loss_and_gradients(plain) if not frozen else None
    if frozen:  # a frozen embedding gets none, tied or not
        batch = packed_batch(some_sequences(4), 60, PAD)
        token_nll(AnswerLogitsModel(faster, packed=True)(batch), batch.target_to_logit, batch.targets).mean().backward()
        assert faster.get_input_embeddings().weight.grad is None
        return
    got = loss_and_gradients(faster)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert (got[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-9, name


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_attention_in_bf16_is_as_near_to_fp32_as_torchs(family):
    exact, plain = tiny_model(family), tiny_model(family).bfloat16()
    faster = copy.deepcopy(plain)
    speed_up(faster)
    batch = packed_batch(some_sequences(4), 60, PAD)
    with torch.no_grad():
        wanted, torchs, ours = (AnswerLogitsModel(m, packed=True)(batch).float() for m in (exact, plain, faster))
    assert not torch.equal(torchs, ours), "the products were not used"
    assert (ours - wanted).norm() <= 1.2 * (torchs - wanted).norm()


def test_the_head_multiplies_a_frozen_weight_once():
    """Torch would copy the weight for every prompt whose last position is asked for."""
    model = tiny_model("llama").requires_grad_(False)
    speed_up(model)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    with torch.no_grad():
        model(torch.randint(3, 600, (5, 9)), logits_to_keep=1)
    assert seen == [True]
