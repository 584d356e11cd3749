"""The packed tree against the padded layout, and the reference against a second model."""

import copy
import random

import pytest
import torch
from conftest import make_tokenizer, tiny_model

from data_module import Sequence
from engine.reference import ReferenceCache
from engine.token_values import fused_nll_and_kl
from engine.tree import AnswerLogitsModel, check_packing, packed_batch, padded_batch, wrap_model
from engine.tree_mask import dense_mask
from method.losses import gradient_ascent, sequence_mean
from prompts.formatter import PromptFormatter

PAD = 1


def some_sequences(seed: int = 0) -> list[Sequence]:
    """Two harmful prompts with an answer and three branches each, four normal rows; all begin with the same words."""
    draw = random.Random(seed)

    def words(low, high):
        return tuple(draw.randrange(3, 600) for _ in range(draw.randint(low, high)))

    system = words(4, 4)
    out = []
    for group in range(2):
        prompt = system + words(3, 9)
        out.append(Sequence("forget", group, prompt, words(2, 12)))
        out += [Sequence("random", group, prompt, words(1, 8)) for _ in range(3)]
    return out + [Sequence("normal", group, system + words(2, 9), words(1, 12)) for group in range(4)]


def step_loss(forward, batch, reference):
    logits = forward(batch)
    forget, rand, normal = (batch.tokens_of(k) for k in ("forget", "random", "normal"))
    original = reference.logits([s for s in batch.sequences if s.draw == "normal"])
    nll, kl = fused_nll_and_kl(logits, batch.target_to_logit, batch.targets, batch.target_to_logit[normal], original)
    count = len(batch.sequences)
    terms = torch.stack([
        gradient_ascent(nll[forget], batch.sequence_ids[forget], count).sum() / forget.sum(),
        sequence_mean(nll[rand], batch.sequence_ids[rand], count).mean(),
        kl.mean(),
    ])  # fmt: skip
    return terms


# the last three do something to the head's output: a cap, a division, a product
@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "qwen2", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("pack_tokens", [40, 10_000])  # several rows, and one
def test_packed_equals_padded_in_every_term_and_gradient(family, pack_tokens):
    model, sequences = tiny_model(family), some_sequences(seed=3)
    assert check_packing(model, sequences, pack_tokens, PAD)[0]
    packed, padded = AnswerLogitsModel(model, packed=True), AnswerLogitsModel(model, packed=False)
    normal = [s for s in sequences if s.draw == "normal"]
    references = ReferenceCache(packed, normal, 40, PAD), ReferenceCache(padded, normal, 40, PAD)
    with torch.no_grad():  # the model moves on, the original stays
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    results = []
    for forward, batch, reference in (
        (packed, packed_batch(sequences, pack_tokens, PAD), references[0]),
        (padded, padded_batch(sequences, PAD), references[1]),
    ):
        terms = step_loss(forward, batch, reference)
        gradients = torch.autograd.grad(terms @ torch.tensor([0.5, 1.0, 1.0]), list(model.parameters()))
        results.append((terms.detach(), torch.cat([g.flatten() for g in gradients])))
    (terms_a, grad_a), (terms_b, grad_b) = results
    assert terms_b[2] > 1e-3, "the KL must have something to measure"
    torch.testing.assert_close(terms_a, terms_b, rtol=1e-5, atol=1e-6)
    assert (grad_a - grad_b).norm() <= 1e-5 * grad_b.norm()


def test_no_common_beginning_stands_twice():
    prompt = (5, 6, 7)
    sequences = [
        Sequence("forget", 0, prompt, (10, 11)),
        Sequence("random", 0, prompt, (10, 12)),  # shares its first answer token too
        Sequence("random", 0, prompt, (13,)),
        Sequence("random", 0, prompt, (14, 15, 16)),
    ]
    batch = packed_batch(sequences, 1000, PAD)
    # the last token of a sequence predicts nothing, so 11, 12, 13 and 16 are not put through the model
    assert batch.input_ids.tolist() == [[5, 6, 7, 10, 14, 15]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    # token 10 (place 3) has no descendant, token 14 has one
    assert batch.ends.tolist() == [[6, 6, 6, 4, 6, 6]]
    # which token sees which: token 15 (place 5) sees the prompt and 14, not 10
    assert dense_mask(batch.ends)[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]
    # the first answer token is predicted by the prompt's last token, the second by the first
    assert batch.logit_positions[batch.target_to_logit].tolist() == [2, 3, 2, 3, 2, 2, 4, 5]
    assert batch.targets.tolist() == [10, 11, 10, 12, 13, 14, 15, 16]
    assert batch.is_first_token.tolist() == [True, False, True, False, True, True, False, False]


@pytest.mark.parametrize("pad", [0, 1, 2, 77])
def test_padding_reaches_no_mean(pad):
    """The published code's losses changed with the pad id and with the padded length; these can't."""
    sequences, model = some_sequences(5), tiny_model("opt")
    forward = AnswerLogitsModel(model, packed=False)
    batch = padded_batch(sequences, pad)
    alone = [forward(b)[b.target_to_logit] for b in (padded_batch([s], pad) for s in sequences)]
    torch.testing.assert_close(forward(batch)[batch.target_to_logit], torch.cat(alone), rtol=1e-4, atol=1e-4)
    assert len(batch.targets) == sum(len(s.answer_ids) for s in sequences)  # answer tokens, no question token


def test_a_head_that_bends_its_likeliest_logits_alone_is_noticed(monkeypatch):
    """A cap moves the few large logits; over a whole vocabulary the difference is below bf16's tolerance."""
    model = tiny_model("gemma2", 20_000).bfloat16()
    with torch.no_grad():
        model.model.norm.weight.fill_(6.0)  # large states: the largest logits are beyond the cap
    assert check_packing(model, some_sequences(), 100, PAD)[0]
    monkeypatch.setattr("engine.tree.finish_logits", lambda config, logits: logits)
    assert not check_packing(model, some_sequences(), 100, PAD)[0]


def test_a_model_that_cannot_is_padded_and_says_so():
    able, line = check_packing(tiny_model("bloom"), some_sequences(), 100, PAD)  # ALiBi: positions come from the mask
    assert not able
    assert line.startswith("padded layout")


@pytest.mark.parametrize(
    ("dropped", "dtype"),  # so small a model hardly looks at positions: bf16's tolerance is above that
    [("position_ids", torch.float32), ("attention_mask", torch.float32), ("attention_mask", torch.bfloat16)],
)
def test_a_model_that_ignores_the_layout_is_found_out(dropped, dtype):
    """Without an error of its own: only its logits tell."""
    model = tiny_model("llama").to(dtype).eval()
    assert check_packing(model, some_sequences(), 100, PAD)[0]
    forward = model.base_model.forward
    model.base_model.forward = lambda **given: forward(**{**given, dropped: None})
    able, line = check_packing(model, some_sequences(), 100, PAD)
    assert not able
    assert "other logits" in line


@pytest.mark.parametrize("family", ["gemma3", "gpt_neo"])
def test_a_window_shorter_than_a_row_is_padded_and_says_so(family):
    """Packed rows bring their own mask, in which a token looks back as far as it likes: other logits in long rows."""
    tokenizer = make_tokenizer("chat")
    model, prompts = tiny_model(family, len(tokenizer)).eval(), ["How do I open a lock?"]
    formatter = PromptFormatter(tokenizer, "auto", 30, 20)
    formatter.fit(model.config, 100)  # the answers of the other side may be longer
    assert not wrap_model(model, formatter, prompts)[0].packed
    for prompt_tokens, packs in ((100, False), (40, True)):
        forward, line = wrap_model(model, PromptFormatter(tokenizer, "auto", prompt_tokens, 20), prompts)
        assert forward.packed == packs, line
        assert packs or "looks back 64 tokens and a row may have 120" in line
    if family == "gpt_neo":  # it differs where a row of the pack holds several sequences
        return
    # and this is what it would have been: the same row of 100 tokens in both layouts
    row = [Sequence("normal", 0, tuple(range(5, 95)), tuple(range(95, 105)))]
    padded = AnswerLogitsModel(model, packed=False)(padded_batch(row, PAD))  # (N, V)
    packed = AnswerLogitsModel(model, packed=True)(packed_batch(row, 256, PAD))
    assert (padded - packed).abs().max() > 0.1 * padded.std()


def test_reference_is_the_original_and_stays_it():
    model, sequences = tiny_model("llama"), [s for s in some_sequences() if s.draw == "normal"]
    original = AnswerLogitsModel(copy.deepcopy(model), packed=False)
    reference = ReferenceCache(AnswerLogitsModel(model, packed=True), sequences, 64, PAD)
    with torch.no_grad():
        for parameter in model.parameters():  # the head is tied: moving it must not move the reference
            parameter.add_(1.0)
    assert not any(isinstance(kept, torch.nn.Module) for kept in vars(reference).values()), "a second model in memory"
    batch = padded_batch(sequences[::-1], PAD)
    torch.testing.assert_close(
        reference.logits(sequences[::-1]), original(batch)[batch.target_to_logit], rtol=1e-4, atol=1e-4
    )
