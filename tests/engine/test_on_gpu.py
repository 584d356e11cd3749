"""What only a GPU can run: flex attention's kernel, compiled layers and passes. Their twins run on a CPU elsewhere."""

import copy
import types

import pytest
import torch
import transformers
from test_layout import step_sequences

from engine import decoding, generation
from engine.compiled_layers import KnownGraphs, compile_layers
from engine.head import OutputHead
from engine.layout import packed_batch, padded_batch
from engine.speedups import speed_up, takes_blocks
from engine.token_values import NLL, TokenRequest, token_values, weighted_values
from engine.tree import AnswerLogitsModel, check_packing
from utils import without_dropout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
KINDS = {"opt": transformers.OPTConfig, "llama": transformers.LlamaConfig, "gpt_neox": transformers.GPTNeoXConfig,
         "qwen2": transformers.Qwen2Config, "gemma": transformers.GemmaConfig}  # fmt: skip


def model_of(family: str, heads: int = 4):
    """A random model in fp32 on the GPU, whose heads are as wide as flex attention's kernel needs."""
    config = KINDS[family](vocab_size=2000, hidden_size=16 * heads, num_hidden_layers=3, num_attention_heads=heads,
                           max_position_embeddings=1024)  # fmt: skip
    for name, value in (("intermediate_size", 96), ("ffn_dim", 96), ("word_embed_proj_dim", 16 * heads),
                        ("head_dim", 16), ("num_key_value_heads", heads // 3 if heads % 3 == 0 else 2)):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return without_dropout(model).train().cuda()


def short_steps(rows: int, seed: int):
    """A step whose tokens fit a vocabulary of 2,000."""
    rows = step_sequences(rows, seed)
    small = {s: tuple(t % 1990 + 5 for t in s.prompt_ids) for s in rows}
    return [type(s)(s.draw, s.example_id, small[s], tuple(t % 1990 + 5 for t in s.answer_ids)) for s in rows]


def nll_and_gradients(model, batch, *, fused: bool, known: bool = True):
    """The mean NLL of a batch and all gradients, by whole logits or by the fused head."""
    model.zero_grad()
    answer_model = AnswerLogitsModel(model, packed=batch.ends is not None)
    request = TokenRequest(NLL, batch.target_to_logit, batch.targets)
    if fused:
        states = answer_model(batch, states=True)
        if known:
            order = batch.target_to_logit.argsort()
            request = TokenRequest(NLL, batch.target_to_logit[order], batch.targets[order])
            request.host_rows = request.rows.cpu().numpy()
            weight = torch.full((len(order),), 1 / len(order), device="cuda")
            loss, _ = weighted_values(states, [request], [weight], OutputHead(model))
        else:
            loss = token_values(states, [request], OutputHead(model))[0].mean()
    else:
        loss = token_values(answer_model(batch), [request])[0].mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("family", "heads"), [*((family, 4) for family in KINDS), ("llama", 9)])
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_on_the_gpu_equals_padded(family, heads, compiled):
    torch._dynamo.reset()
    plain = model_of(family, heads)
    packed = copy.deepcopy(plain)
    speed_up(packed)
    able, line = check_packing(packed, short_steps(1, 5), 256, 1)
    assert able, line
    assert takes_blocks(packed)
    graphs = KnownGraphs(trusted=True)
    if compiled:
        compile_layers(packed)
    for rows in (1, 2, 3, 4):  # widths differ; from the third on the graphs are known
        sequences = short_steps(rows, rows)
        wanted, wanted_grad = nll_and_gradients(plain, padded_batch(sequences, 1).to("cuda"), fused=False)
        batch = packed_batch(sequences, 256, 1, one_row=True).to("cuda")
        with torch.no_grad():  # an evaluation on the way: another graph
            AnswerLogitsModel(packed, packed=True)(batch)
        for known in (False, True):
            with graphs.of(batch):
                found, grad = nll_and_gradients(packed, batch, fused=True, known=known)
            assert found == pytest.approx(wanted, rel=1e-4)
            assert (grad - wanted_grad).norm() <= 1e-3 * wanted_grad.norm()


def test_a_step_waits_for_the_gpu_only_where_it_reads():
    """From the plan to the gradients nothing asks the device: torch would raise where the host waits."""
    model = model_of("llama")
    speed_up(model)
    batch = packed_batch(short_steps(2, 1), 256, 1, one_row=True)
    rows = batch.target_to_logit.sort().values
    host_rows, weight = rows.numpy(), torch.full((len(rows),), 0.01).pin_memory().cuda()
    requests = [TokenRequest(NLL, rows.cuda(), batch.targets.cuda(), host_rows=host_rows)]
    batch = batch.to("cuda")
    answer_model = AnswerLogitsModel(model, packed=True)
    for strict in (0, 1):  # the first one compiles
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        try:
            total, _ = answer_model(batch, requests, [weight])
            total.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", KINDS)
def test_answers_by_a_captured_graph_are_those_of_the_plain_step(family, temperature, monkeypatch):
    """Three batches in turn, so that a second graph meets the memory of the first; two prompts begin alike."""
    model = model_of(family).eval()
    model.generation_config.eos_token_id = None
    stand_in = types.SimpleNamespace(pad_token_id=0, decode=lambda tokens, **_: " ".join(map(str, tokens)))
    formatter = types.SimpleNamespace(tokenizer=stand_in, stop_ids=lambda: [*range(5, 2000, 40)],
                                      read_answer=lambda prompt, tokens: stand_in.decode(tokens))  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    prompts = [[9] * 12 + torch.randint(5, 1990, (4 + 3 * i,), generator=draw).tolist() for i in range(9)]
    settings = {"max_new_tokens": 40, "batch_size": 3, "temperature": temperature, "seed": 5}
    captured, make = [], decoding._captured

    def note(decoder):
        captured.append(make(decoder))
        return captured[-1]

    monkeypatch.setattr(decoding, "_captured", note)
    found = generation.generate(model, formatter, prompts, **settings)
    assert len(captured) == 3
    assert all("replay" in getattr(step, "__name__", "") for step in captured), "no step had to run as it is"
    monkeypatch.setattr(generation, "decodes_by_buffers", lambda model: False)
    assert generation.generate(model, formatter, prompts, **settings) == found
