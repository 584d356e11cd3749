"""Head and losses fused in chunks against the same losses from whole logits."""

import peft
import pytest
import torch
from conftest import tiny_model
from test_tree import PAD, some_sequences

from engine import token_values as fused
from engine.head import FrozenHead, OutputHead, finish_logits
from engine.layout import packed_batch
from engine.token_values import KL, NLL, TokenRequest
from method.losses import token_kl, token_nll
from method.objectives import Unlikelihood


def make_head(kind: str):
    """A model whose head is plain, has a bias or adapters, is frozen, or whose logits are capped or divided."""
    family = {"capped": "gemma2", "divided": "granite"}.get(kind, "qwen2")
    model = tiny_model(family)
    if kind == "bias":
        model.lm_head = torch.nn.Linear(32, 600)
    if kind == "adapters":
        model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["lm_head"], r=4), model)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora" in name)
            if "lora_B" in name:  # at their start they are 0
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    if kind == "frozen":
        model.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", ["plain", "bias", "frozen", "capped", "divided", "adapters"])
@pytest.mark.parametrize("chunk", [7, 1000])  # several chunks, which the backward makes again, and one, which is kept
@pytest.mark.parametrize("known", [False, True])
def test_fused_equals_whole_logits(kind, chunk, known, monkeypatch):
    model = make_head(kind)
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", chunk * 600 * 4)
    monkeypatch.setitem(fused.FP32_BYTES, "cpu", 3 * 600 * 4)
    module, draw = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    weights = [p for p in module.parameters() if p.requires_grad]
    states = torch.randn(37, 32, generator=draw, requires_grad=True)
    before = torch.randn(25, 32, generator=draw)  # the original's states at the tokens of the KL
    rows = [torch.randint(0, 37, (count,), generator=draw).sort().values for count in (60, 25, 20)]
    targets = [torch.randint(0, 600, (len(r),), generator=draw) for r in rows]
    factors = [torch.randn(len(r), generator=draw) for r in rows]
    frozen = FrozenHead(torch.randn(600, 32, generator=draw), None, model.config)
    logits = finish_logits(model.config, module(states))
    plain = [
        token_nll(logits, rows[0], targets[0]),
        token_kl(logits[rows[1]], frozen.logits(before)),
        Unlikelihood.token_loss.values(logits[rows[2]], targets[2], None),
    ]
    wanted = torch.autograd.grad(sum((f * v).sum() for f, v in zip(factors, plain, strict=True)), [states, *weights])

    class Original:
        def logits(self, part):
            return frozen.logits(before[part])

    losses, originals = (NLL, KL, Unlikelihood.token_loss), (None, Original(), None)
    requests = [
        TokenRequest(*one, host_rows=one[1].numpy()) for one in zip(losses, rows, targets, originals, strict=True)
    ]
    head = OutputHead(model)
    if known:
        total, values = fused.weighted_values(states, requests, factors, head)
    else:
        values = fused.token_values(states, requests, head)
        total = sum((f * v).sum() for f, v in zip(factors, values, strict=True))
    found = torch.autograd.grad(3 * total, [states, *weights])
    for one, other in zip(values, plain, strict=True):
        torch.testing.assert_close(one, other.detach() if known else other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, wanted, strict=True):
        assert (one - 3 * other).norm() <= 1e-5 * (3 * other).norm()


@pytest.mark.parametrize("needs_grad", [False, True])
def test_logits_are_never_whole(monkeypatch, needs_grad):
    """The largest number of logit rows that a step makes at once is a chunk's."""
    model = tiny_model("qwen2")
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 5 * 600 * 4)
    batch, seen = packed_batch(some_sequences(1), 100, PAD), []
    head = OutputHead(model)
    real = head.forward
    head.forward = lambda states, *given: (seen.append(len(states)), real(states, *given))[1]
    states = torch.randn(len(batch.logit_positions), 32, requires_grad=True)
    request = TokenRequest(NLL, batch.target_to_logit, batch.targets)
    with torch.set_grad_enabled(needs_grad):
        (nll,) = fused.token_values(states, [request], head)
    if needs_grad:
        nll.sum().backward()
    assert max(seen) == 5
    assert sum(seen) == len(states) * (1 + needs_grad)
