"""Compiled layers: one graph for all layers and widths, and the plain layers for everything that is no packed row.

torch traces here as it does on a GPU; the traced graph is run as it is, since flex attention's kernel needs a GPU.
"""

from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from test_layout import step_sequences
from test_tree import PAD
from torch._dynamo.testing import CompileCounterWithBackend

from engine.compiled_layers import KnownGraphs, compile_layers, decompile_layers, why_not_compiled
from engine.layout import packed_batch
from engine.speedups import BLOCKS
from engine.tree import AnswerLogitsModel
from run import warm_up


@pytest.fixture
def blocks_model():
    model = tiny_model("llama", 50_000)
    model.set_attn_implementation(BLOCKS)
    yield model
    torch._dynamo.reset()


@torch.no_grad()
def test_all_layers_and_widths_share_a_graph(blocks_model):
    model, graphs = blocks_model, KnownGraphs(trusted=True)
    batches = [packed_batch(step_sequences(rows, rows), 256, PAD, one_row=True) for rows in (1, 2, 3, 4)]
    answer_model = AnswerLogitsModel(model, packed=True)
    plain = [answer_model(batch) for batch in batches]
    ids = torch.randint(3, 600, (2, 9), generator=torch.Generator().manual_seed(0))
    answer = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    counter = CompileCounterWithBackend("eager")
    compile_layers(model, backend=counter)
    for batch, wanted in zip(batches, plain, strict=True):
        with graphs.of(batch):
            torch.testing.assert_close(answer_model(batch), wanted, rtol=1e-4, atol=1e-5)
    assert len(graphs.widths) == 2, "from the third width on, the graphs are known"
    assert counter.frame_count == 2, "one for the first width, one for all others"
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3, do_sample=False), answer)
    assert counter.frame_count == 2, "generation runs the plain layers"
    decompile_layers(model)
    assert torch.equal(answer_model(batches[0]), plain[0])


def test_a_narrow_row_and_a_padded_batch_are_always_checked():
    graphs = KnownGraphs(trusted=True)
    for rows in (1, 2, 3):
        with graphs.of(packed_batch(step_sequences(rows, rows), 256, PAD, one_row=True)):
            pass
    narrow = packed_batch(step_sequences(1, 1)[:1], 256, PAD, one_row=True)
    with graphs.of(narrow):
        from torch._dynamo.eval_frame import _is_skip_guard_eval_unsafe_stance

        assert not _is_skip_guard_eval_unsafe_stance()


def test_why_layers_stay_as_they_are(blocks_model):
    assert why_not_compiled(blocks_model, "auto", 1000) is None
    assert "fewer than 500 steps" in why_not_compiled(blocks_model, "auto", 10)
    assert why_not_compiled(blocks_model, "on", 10) is None
    assert "--compile off" in why_not_compiled(blocks_model, "off", 1000)
    assert "CUDA" in why_not_compiled(tiny_model("llama"), "on", 1000)


@pytest.mark.parametrize("wrong", [False, True])
def test_checks_are_left_out_only_if_the_gradient_stays_the_same(monkeypatch, wrong):
    """The norms of one step, without checks and with them, of a width that no earlier step had."""
    graphs, asked = KnownGraphs(), []
    graphs.widths = {300, 400}

    def step(width):
        batch = SimpleNamespace(input_ids=torch.zeros(1, width))
        return SimpleNamespace(parts=[SimpleNamespace(plan=SimpleNamespace(batch=batch))])

    def norm(setup, prepared):
        asked.append((prepared.parts[0].plan.batch.input_ids.shape[1], graphs.trusted))
        return 2.0 if wrong and graphs.trusted else 1.0

    monkeypatch.setattr(warm_up, "gradient_norm", norm)
    setup = SimpleNamespace(graphs=graphs, options=SimpleNamespace(max_unlearn_steps=5),
                            prepare_step=lambda number: step(300 + 50 * (number == 3)))  # fmt: skip
    assert warm_up.unchecked_equals_checked(setup) is not wrong
    assert asked == [(350, True), (350, False)]
