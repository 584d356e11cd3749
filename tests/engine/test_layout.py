"""The layout of a step: what a token sees, how much of it is padding, and the block mask against the dense one."""

import random
import time

import pytest
import torch
from conftest import tiny_model
from test_tree import PAD, some_sequences
from torch.nn.attention.flex_attention import create_mask, flex_attention

from data_module import Sequence
from engine.layout import MAX_PADDING, packed_batch, padded_width
from engine.reference import ReferenceCache
from engine.tree import AnswerLogitsModel
from engine.tree_mask import block_mask, dense_mask


def step_sequences(rows: int, seed: int = 0) -> list[Sequence]:
    """A step of the published recipe: prompts of 12 to 60 tokens, answers of 20 to 128, K = 5."""
    draw = random.Random(seed)

    def words(low, high):
        return tuple(draw.randrange(3, 50_000) for _ in range(draw.randint(low, high)))

    system, out = words(5, 5), []
    for row in range(rows):
        prompt = system + words(12, 60)
        out += [Sequence("forget" if k == 0 else "mismatch", row, prompt, words(20, 128)) for k in range(6)]
        out.append(Sequence("retain", row, system + words(12, 60), words(20, 128)))
    return out


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("one_row", [False, True])
def test_padding_is_at_most_a_tenth_at_any_batch_size(rows, one_row):
    for seed in range(5):
        batch = packed_batch(step_sequences(rows, seed), 256, PAD, one_row=one_row)
        assert batch.padding <= MAX_PADDING, (rows, seed)
        assert (batch.input_ids.shape[0] == 1) or not one_row
    assert len({padded_width(n) for n in range(8193, 16385)}) == 16, "a compiled kernel would meet many widths"
    assert all(n <= padded_width(n) <= n / (1 - MAX_PADDING) for n in range(1, 20_000))


def test_rows_are_narrow_where_that_wastes_nothing():
    """Attention costs the square of the width: eight prompts of the same length fill four rows, not one."""
    sequences = [Sequence("retain", row, (row,) * 100, (7,) * 28) for row in range(8)]
    assert packed_batch(sequences, 256, PAD).input_ids.shape == (4, 2 * 127)


def test_a_large_step_is_laid_out_in_milliseconds():
    sequences = step_sequences(24)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        batch = packed_batch(sequences, 256, PAD, one_row=True)
        times.append(time.perf_counter() - start)
    assert batch.num_tokens > 11_000
    assert min(times) < 0.05, "the tree of dictionaries took 0.1 to 0.2 s"


@pytest.mark.parametrize("length", [60, 500])  # one block, and several, the last of them not full
def test_the_block_mask_is_the_dense_mask(length):
    """flex attention's kernel runs on a GPU; here the function that it compiles is compared, block by block."""
    sequences = some_sequences(1) if length < 128 else step_sequences(1, 4)
    batch = packed_batch(sequences, 256, PAD, one_row=True)
    places = batch.ends.shape[1]
    blocks, dense = block_mask(batch.ends), dense_mask(batch.ends)
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, places, places, device="cpu"), dense)
    count = -(-places // 128)
    room = torch.zeros(count * 128, count * 128, dtype=torch.bool)
    room[:places, :places] = dense[0, 0]
    tiles = room.view(count, 128, count, 128).transpose(1, 2)  # (B, B, 128, 128)
    looked_at = blocks.to_dense()[0, 0].bool()  # the blocks that the kernel does not skip
    assert torch.equal(looked_at, tiles.flatten(2).any(-1))
    for i, (number, which) in enumerate(
        zip(blocks.full_kv_num_blocks[0, 0], blocks.full_kv_indices[0, 0], strict=True)
    ):
        for j in which[:number].tolist():  # without a mask in the kernel, so all of it must be seen
            assert tiles[i, j][: places - i * 128].all()
    query = torch.randn(1, 2, places, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = flex_attention(query, query, query, block_mask=blocks)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=dense)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_last_token_of_a_sequence_is_not_put_through_the_model():
    prompt, answers = (5, 6), [(10, 11), (12,), (13, 14, 15)]
    sequences = [Sequence("forget", 0, prompt, answer) for answer in answers]
    batch = packed_batch(sequences, 256, PAD)
    assert sorted(batch.input_ids.flatten().tolist()) == [5, 6, 10, 13, 14]
    assert batch.targets.tolist() == [10, 11, 12, 13, 14, 15]


def test_cached_states_are_taken_by_an_index_made_on_the_host():
    model, sequences = tiny_model("llama"), some_sequences(2)
    reference = ReferenceCache(AnswerLogitsModel(model, packed=True), sequences[:6], 64, PAD)
    reference.precompute(AnswerLogitsModel(model, packed=True), sequences)  # what is new, after what was there
    chosen = [sequences[9], sequences[1], sequences[9]]
    places = reference.places(chosen)
    assert len(places) == sum(len(s.answer_ids) for s in chosen)
    alone = torch.cat([reference.original([s]).taken() for s in chosen])
    assert torch.equal(reference.original(chosen).taken(), alone)


def test_a_plan_reaches_the_device_in_one_copy(monkeypatch):
    """The buffer's views are the tensors, of every type and shape; `meta` stands for a device that is no CPU."""
    batch = packed_batch(some_sequences(1), 100, PAD)
    buffers = []
    real = torch.Tensor.to

    def to(tensor, device, **how):
        buffers.append(tensor)
        return tensor.clone() if how else real(tensor, device)

    monkeypatch.setattr(torch.Tensor, "to", to)
    moved = batch.to(torch.device("meta"))
    assert len(buffers) == 1
    for name in ("input_ids", "ends", "is_first_token", "target_to_logit"):
        one, other = getattr(batch, name), getattr(moved, name)
        assert one.dtype == other.dtype and torch.equal(one, other) and one is not other
    assert moved.sequences is batch.sequences or moved.sequences == batch.sequences


def test_a_common_beginning_stands_near_its_tokens_in_one_row():
    """Six tokens that all prompts share: once a prompt, for 2 % more tokens; two hundred of them once."""
    for shared, copies in ((6, 8), (200, 1)):
        system = tuple(range(3, 3 + shared))
        sequences = [Sequence("forget", r, (*system, 500 + r, *range(30)), (k, *range(40, 90)))
                     for r in range(8) for k in range(6)]  # fmt: skip
        batch = packed_batch(sequences, 256, PAD, one_row=True)
        starts = (batch.position_ids[0] == 0) & (batch.input_ids[0] == 3)
        assert starts.sum() == copies
        assert batch.num_tokens == shared + 8 * (31 + 6 * 50), "what stands twice counts once"
        placed = batch.num_tokens + (copies - 1) * shared
        seen = dense_mask(batch.ends)[0, 0].sum(-1)
        assert torch.equal(seen[:placed], batch.position_ids[0, :placed] + 1), "a token sees its ancestors and itself"
