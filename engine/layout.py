"""The layout of a step: many sequences as trees of tokens in preorder, which store each shared beginning once.

A forget prompt is followed by its own answer and by K replacement answers, and every chat prompt starts with the same
tokens. Such beginnings are shared. The sequences are inserted in sorted order, so a tree lies in its row in preorder:
a token's descendants follow it without a gap, and a token at place i sees exactly the places j <= i < ends[j]. One
number a place describes the whole mask. A causal model gives each token the state that it would have in a sequence of
its own, for a fraction of the tokens.

The last token of a sequence predicts nothing that a loss reads, so it is not put through the model.

`padded_batch` lays out the same sequences one a row, for models that cannot take the trees.
Letters: R rows, T places a row, N logit rows, M answer tokens, S sequences.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import torch

from data_module import Sequence
from engine.host_copy import copied

MAX_PADDING = 0.1  # of the places of a packed batch
MAX_TWICE = 0.02  # of the tokens of a single row: common beginnings that stand more than once in it
SIZES_PER_OCTAVE = 16  # of the widths that a single row is padded to: compiled kernels meet few of them


@dataclasses.dataclass
class Batch:
    """Token ids with their layout, and the place that predicts each answer token."""

    sequences: list[Sequence]
    input_ids: torch.Tensor  # (R, T)
    position_ids: torch.Tensor  # (R, T): depth in the tree
    logit_positions: torch.Tensor  # (N,) places in the flattened (R * T,) that need logits, ascending
    target_to_logit: torch.Tensor  # (M,) in [0, N): the logit row that predicts the answer token
    targets: torch.Tensor  # (M,) the answer tokens
    sequence_ids: torch.Tensor  # (M,) in [0, S): the sequence of each answer token
    is_first_token: torch.Tensor  # (M,) bool: first token of its answer
    num_tokens: int  # tokens without padding and without what stands twice
    ends: torch.Tensor | None = None  # packed: (R, T) int32, the place after the last descendant of each place
    attention_mask: torch.Tensor | None = None  # padded: (R, T), 1 = real token

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return copied(self, device)

    def tokens_of(self, draw: str) -> torch.Tensor:
        """Return a mask (M,) bool: the answer tokens of one draw's sequences."""
        of_draw = torch.tensor([s.draw == draw for s in self.sequences], device=self.sequence_ids.device)  # (S,)
        return of_draw[self.sequence_ids]

    @property
    def padding(self) -> float:
        """The fraction of the places that hold no token."""
        return 1 - self.num_tokens / self.input_ids.numel()


# -------------------------------------------------------------------------------------------- packed trees
def packed_batch(sequences: list[Sequence], pack_tokens: int, pad_id: int, *, one_row: bool = False) -> Batch:
    """Pack sequences into R rows of about `pack_tokens` places each. Sequences with the same prompt share a row.

    The rows are as narrow as they can be without more than MAX_PADDING of padding. With `one_row`, all sequences are
    in one row, whose width is one of few sizes.
    """
    inputs = [_inputs(s) for s in sequences]
    if one_row:
        rows = [list(range(len(sequences)))]
        forest, twice = _segments(sequences, inputs)
        forests = [forest]
    else:
        rows, twice = _assign_rows(sequences, inputs, pack_tokens), 0
        forests = [preorder([inputs[s] for s in row]) for row in rows]
    longest = max(len(forest.tokens) for forest in forests)
    width = padded_width(longest) if one_row else longest  # T
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)  # (R, T)
    positions = np.zeros((len(rows), width), dtype=np.int64)
    ends = np.broadcast_to(np.arange(1, width + 1, dtype=np.int32), ids.shape).copy()  # padding sees itself alone
    places: list[np.ndarray] = [None] * len(sequences)
    for r, (row, forest) in enumerate(zip(rows, forests, strict=True)):
        length = len(forest.tokens)
        ids[r, :length], positions[r, :length], ends[r, :length] = forest.tokens, forest.depths, forest.ends
        for s, path in zip(row, forest.paths, strict=True):
            places[s] = path + r * width
    total = sum(len(forest.tokens) for forest in forests) - twice
    return _build_batch(sequences, ids, positions, places, total, ends=torch.from_numpy(ends))


def padded_width(tokens: int) -> int:
    """Return the width of a single row of `tokens` tokens: at most a sixteenth more, and one of few sizes."""
    step = max(1, 2 ** (tokens.bit_length() - 1) // SIZES_PER_OCTAVE)
    return -(-tokens // step) * step


@dataclasses.dataclass
class Forest:
    """Trees in preorder, L nodes in all: `tokens`, `depths`, `ends` (L,) each.

    ends: the place after a node's last descendant. paths: for each sequence, the places of its tokens.
    """

    tokens: np.ndarray
    depths: np.ndarray
    ends: np.ndarray
    paths: list[np.ndarray]


def preorder(sequences: list[tuple[int, ...]], cuts=None) -> Forest:
    """Merge token sequences into trees, by inserting them in sorted order: only the previous path can be shared.

    cuts: a function of (order, shared): the sequences in sorted order, by number, and how many tokens each begins with
    like the one before it. It returns the places in that order from which on nothing before them is shared.
    """
    order = sorted(range(len(sequences)), key=sequences.__getitem__)
    arrays = [np.array(sequences[s], dtype=np.int64) for s in order]
    shared = [0] + [_common(one, other) for one, other in itertools.pairwise(arrays)]
    for i in cuts(order, shared) if cuts else ():
        shared[i] = 0
    tokens, depths, paths = [], [], [None] * len(sequences)
    ends = np.zeros(sum(map(len, arrays)), dtype=np.int32)
    path, count = np.zeros(0, dtype=np.int64), 0
    for s, current, keep in zip(order, arrays, shared, strict=True):
        ends[path[keep:]] = count  # what the new sequence does not share has no further descendant
        added = len(current) - keep
        path = np.concatenate([path[:keep], np.arange(count, count + added)])
        tokens.append(current[keep:])
        depths.append(np.arange(keep, len(current)))
        paths[s], count = path, count + added
    ends[path] = count
    return Forest(np.concatenate(tokens), np.concatenate(depths), ends[:count], paths)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences begin with alike."""
    both = min(len(one), len(other))
    differs = one[:both] != other[:both]
    first = int(differs.argmax()) if both else 0
    return first if both and differs[first] else both


def _inputs(sequence: Sequence) -> tuple[int, ...]:
    """Return the tokens of a sequence that go through the model."""
    return sequence.prompt_ids + sequence.answer_ids[:-1]


def _segments(sequences: list[Sequence], inputs: list[tuple[int, ...]]) -> tuple[Forest, int]:
    """Return the forest of a single row, cut into segments that share no beginning, and the tokens that stand twice.

    Every chat prompt begins with the same tokens. If these stood once, every token of the row would look at their
    block, and the backward of attention would wait for the one program that goes through all of them. So they stand
    once a segment: once a prompt if that costs at most MAX_TWICE more tokens, else once in several prompts.
    """
    twice = 0

    def cuts(order: list[int], shared: list[int]) -> list[int]:
        nonlocal twice
        sizes = [len(inputs[s]) - common for s, common in zip(order, shared, strict=True)]
        prompts = [sequences[s].prompt_ids for s in order]
        starts = [i for i in range(1, len(order)) if prompts[i] != prompts[i - 1]]
        allowed = int(MAX_TWICE * sum(sizes))
        least = 0.0  # tokens of a segment
        if sum(shared[i] for i in starts) > allowed:
            least = sum(sizes) * min(shared[i] for i in starts) / max(allowed, 1)
        chosen, last = [], 0
        for i in starts:
            if sum(sizes[last:i]) >= least and twice + shared[i] <= allowed:
                chosen.append(i)
                twice, last = twice + shared[i], i
        return chosen

    forest = preorder(inputs, cuts)  # `cuts` counts what stands twice
    return forest, twice


def _assign_rows(sequences: list[Sequence], inputs: list[tuple[int, ...]], pack_tokens: int) -> list[list[int]]:
    """Return the sequences of each row, by number.

    Groups with the same prompt go, the largest first, into the row that is shortest so far. Of the numbers of rows up
    to the one that `pack_tokens` asks for, the largest is taken that leaves little padding: narrow rows cost less
    attention. A single row always does.
    """
    by_prompt: dict[tuple, list[int]] = {}
    for s, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt_ids, []).append(s)
    sizes = {prompt: len(preorder([inputs[s] for s in members]).tokens) for prompt, members in by_prompt.items()}
    groups = sorted(by_prompt, key=lambda prompt: -sizes[prompt])
    total = sum(sizes.values())
    for count in range(min(max(1, round(total / pack_tokens)), len(groups)), 0, -1):
        if total >= (1 - MAX_PADDING) * count * max(sizes[groups[0]], -(-total // count)):
            rows, filled = [[] for _ in range(count)], [0] * count
            for prompt in groups:
                shortest = filled.index(min(filled))
                rows[shortest] += by_prompt[prompt]
                filled[shortest] += sizes[prompt]
            widths = [len(preorder([inputs[s] for s in row]).tokens) for row in rows]
            if sum(widths) >= (1 - MAX_PADDING) * count * max(widths):
                return rows
    raise AssertionError("one row has no padding")


# ---------------------------------------------------------------------------------------------- padded rows
def padded_batch(sequences: list[Sequence], pad_id: int) -> Batch:
    """Lay out sequences one a row, padded on the right: the plain layout that every model takes."""
    inputs = [_inputs(s) for s in sequences]
    width = max(map(len, inputs))  # T
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)  # (S, T)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    places = []
    for r, tokens in enumerate(inputs):
        ids[r, : len(tokens)] = tokens
        mask[r, : len(tokens)] = 1
        places.append(np.arange(r * width, r * width + len(tokens)))
    return _build_batch(sequences, ids, positions, places, int(mask.sum()), attention_mask=torch.from_numpy(mask))


def _build_batch(sequences, ids, positions, places: list[np.ndarray], num_tokens: int, **masks) -> Batch:
    """Build a Batch; places: of each sequence's inputs. The previous token's place predicts an answer token."""
    starts = [len(s.prompt_ids) for s in sequences]
    assert all(starts), "a sequence needs at least one prompt token, or nothing predicts its first answer token"
    lengths = np.array([len(s.answer_ids) for s in sequences])
    predicted_at = [path[start - 1 : start - 1 + n] for path, start, n in zip(places, starts, lengths, strict=True)]
    logit_rows, target_to_logit = np.unique(np.concatenate(predicted_at), return_inverse=True)  # (N,), (M,)
    first = np.zeros(int(lengths.sum()), dtype=bool)
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return Batch(
        sequences=sequences,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        logit_positions=torch.from_numpy(logit_rows),
        target_to_logit=torch.from_numpy(target_to_logit),
        targets=torch.tensor([t for s in sequences for t in s.targets or s.answer_ids], dtype=torch.int64),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(len(sequences)), lengths)),
        is_first_token=torch.from_numpy(first),
        num_tokens=num_tokens,
        **masks,
    )
