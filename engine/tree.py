"""The layout of a step: many sequences packed as trees of tokens that store each shared prefix once.

A forget prompt is followed by its own answer and by K replacement answers. Every chat prompt starts with the same
tokens. Such prefixes are shared, so each packed row holds a tree: a token's parent is the token before it, its
position is its depth, and it attends only to its ancestors. A causal model gives each token the state that the token
would have in its own sequence, for a fraction of the tokens.

`padded_batch` lays out the same sequences one a row, for models that cannot take the tree. `AnswerLogitsModel` returns
the same logits for both layouts.
Letters: R rows, T tokens a row, D hidden size, V vocabulary, N logit rows, M answer tokens, S sequences.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import numpy as np
import torch

from data_module import Sequence, probe_sequences
from engine.adapters import decoder_layers
from engine.processes import copy_to, is_sharded
from engine.speedups import speed_up
from prompts.formatter import PromptFormatter
from utils import attention_window


@dataclasses.dataclass
class Batch:
    """Token ids with their layout, and the place that predicts each answer token."""

    sequences: list[Sequence]
    input_ids: torch.Tensor  # (R, T)
    attention_mask: torch.Tensor  # packed: (R, 1, T, T), True = attends; padded: (R, T), 1 = real token
    position_ids: torch.Tensor  # (R, T): depth in the tree
    logit_positions: torch.Tensor  # (N,) places in the flattened (R * T,) that need logits
    target_to_logit: torch.Tensor  # (M,) in [0, N): the logit row that predicts the answer token
    targets: torch.Tensor  # (M,) the answer tokens
    sequence_ids: torch.Tensor  # (M,) in [0, S): the sequence of each answer token
    is_first_token: torch.Tensor  # (M,) bool: first token of its answer
    num_tokens: int  # tokens without padding; a shared token counts once

    def to(self, device: torch.device) -> Batch:
        """Return the batch with its tensors on `device`."""
        moved = {
            field.name: copy_to(device, value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    def tokens_of(self, draw: str) -> torch.Tensor:
        """Return a mask (M,) bool: the answer tokens of one draw's sequences."""
        of_draw = torch.tensor([s.draw == draw for s in self.sequences], device=self.sequence_ids.device)  # (S,)
        return of_draw[self.sequence_ids]


def packed_batch(sequences: list[Sequence], pack_tokens: int, pad_id: int) -> Batch:
    """Pack sequences into R trees of about `pack_tokens` tokens each. Sequences with the same prompt share a row."""
    by_prompt: dict[tuple, list[int]] = {}
    for s, sequence in enumerate(sequences):
        by_prompt.setdefault(sequence.prompt_ids, []).append(s)
    groups = sorted(
        by_prompt.items(), key=lambda group: -len(group[0]) - sum(len(sequences[s].answer_ids) for s in group[1])
    )
    whole_tree = _Tree()
    for sequence in sequences:
        whole_tree.insert(sequence.prompt_ids + sequence.answer_ids)
    trees = [_Tree() for _ in range(min(max(1, round(len(whole_tree.tokens) / pack_tokens)), len(groups)))]
    paths: list[tuple[int, list[int]]] = [(0, [])] * len(sequences)  # (row, nodes of the sequence in its tree)
    for _, members in groups:  # the largest first, each into the row that is shortest so far
        r = min(range(len(trees)), key=lambda r: len(trees[r].tokens))
        for s in members:
            paths[s] = (r, trees[r].insert(sequences[s].prompt_ids + sequences[s].answer_ids))
    width = max(len(tree.tokens) for tree in trees)  # T
    ids = np.full((len(trees), width), pad_id, dtype=np.int64)
    positions = np.zeros((len(trees), width), dtype=np.int64)
    mask = np.zeros((len(trees), 1, width, width), dtype=bool)
    mask[:, 0, np.arange(width), np.arange(width)] = True  # padding attends to itself: no empty softmax
    for r, tree in enumerate(trees):
        length = len(tree.tokens)
        ids[r, :length], positions[r, :length] = tree.tokens, tree.depths
        for t, parent in enumerate(tree.parents):  # a parent comes before its children
            if parent >= 0:
                mask[r, 0, t] |= mask[r, 0, parent]
    total = sum(len(tree.tokens) for tree in trees)
    return _build_batch(sequences, ids, mask, positions, [[r * width + t for t in path] for r, path in paths], total)


def padded_batch(sequences: list[Sequence], pad_id: int) -> Batch:
    """Lay out sequences one a row, padded on the right: the plain layout that every model takes."""
    width = max(s.length for s in sequences)  # T
    ids = np.full((len(sequences), width), pad_id, dtype=np.int64)  # (S, T)
    mask = np.zeros((len(sequences), width), dtype=np.int64)
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    places = []
    for r, s in enumerate(sequences):
        tokens = s.prompt_ids + s.answer_ids
        ids[r, : len(tokens)] = tokens
        mask[r, : len(tokens)] = 1
        places.append([r * width + t for t in range(len(tokens))])
    return _build_batch(sequences, ids, mask, positions, places, int(mask.sum()))


class _Tree:
    """A prefix tree of token sequences; a node's parent has a smaller number."""

    def __init__(self):
        self.tokens, self.parents, self.depths = [], [], []
        self._child: dict[tuple[int, int], int] = {}

    def insert(self, tokens) -> list[int]:
        """Add a sequence; return the node of each of its tokens."""
        path, node = [], -1
        for depth, token in enumerate(tokens):
            child = self._child.get((node, token))
            if child is None:
                child = len(self.tokens)
                self._child[node, token] = child
                self.tokens.append(token)
                self.parents.append(node)
                self.depths.append(depth)
            node = child
            path.append(node)
        return path


def _build_batch(sequences, ids, mask, positions, places, num_tokens) -> Batch:
    """Build a Batch. Each answer token is predicted at the place of the previous token."""
    predicted_at, targets, sequence_ids, is_first = [], [], [], []
    for s, sequence in enumerate(sequences):
        start = len(sequence.prompt_ids)
        assert start > 0, "a sequence needs at least one prompt token, or nothing predicts its first answer token"
        predicted_at += places[s][start - 1 : -1]
        targets += sequence.targets or sequence.answer_ids
        sequence_ids += [s] * len(sequence.answer_ids)
        is_first += [j == 0 for j in range(len(sequence.answer_ids))]
    logit_rows, target_to_logit = np.unique(np.array(predicted_at, dtype=np.int64), return_inverse=True)  # (N,), (M,)
    return Batch(
        sequences,
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.from_numpy(positions),
        torch.from_numpy(logit_rows),
        torch.from_numpy(target_to_logit),
        torch.tensor(targets, dtype=torch.int64),
        torch.tensor(sequence_ids, dtype=torch.int64),
        torch.tensor(is_first, dtype=torch.bool),
        num_tokens,
    )


# ------------------------------------------------------------------------------------------ the forward
class AnswerLogitsModel(torch.nn.Module):
    """The model as the loop calls it: takes a batch, returns logits (N, V) at the answer positions.

    It is a module of its own, so that a wrapper for several processes sees one forward a step.
    """

    def __init__(self, model, *, packed: bool):
        super().__init__()
        self.model = model
        self.packed = packed
        self.dtype = None  # of the layers, if the parameters have another type

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the states after the final norm at the answer positions, (N, D). Packed layout only."""
        body = self.model.base_model
        mask = torch.zeros(
            batch.attention_mask.shape, dtype=self.dtype or self.model.dtype, device=batch.input_ids.device
        )
        mask.masked_fill_(~batch.attention_mask, torch.finfo(mask.dtype).min)  # (R, 1, T, T), added to the scores
        out = body(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
        states = out[0]  # (R, T, D)
        return states.flatten(0, 1)[batch.logit_positions]  # (N, D)

    @property
    def generator(self) -> torch.nn.Module:
        """The module that generates answers: the model, or this module if the model is sharded, since it gathers it."""
        return self if is_sharded(self) else self.model

    def generate(self, **settings):
        return self.model.generate(**settings)

    def forward(self, batch: Batch, *, states: bool = False, layers: tuple[int, ...] = ()):
        """Return logits (N, V), or the states of `hidden` (N, D) with `states`.

        With `layers`, return (that tensor, {layer: hidden states after it, (N, D)}). Every forward of a sharded model
        passes here.
        """
        with self._captured(layers) as captured:
            if states:
                out = self.hidden(batch)
            elif self.packed:
                out = finish_logits(self.model.config, self.model.get_output_embeddings()(self.hidden(batch)))  # (N, V)
            else:
                output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                out = output.logits.flatten(0, 1)[batch.logit_positions]  # (R, T, V) -> (N, V)
        if not layers:
            return out
        return out, {layer: state.flatten(0, 1)[batch.logit_positions] for layer, state in captured.items()}

    @contextlib.contextmanager
    def _captured(self, layers: tuple[int, ...]):
        """Yield a dict that receives the output (R, T, D) of each of these layers during a forward."""
        layer_outputs: dict[int, torch.Tensor] = {}
        modules = decoder_layers(self.model)[1] if layers else ()

        def note(layer: int):
            def hook(module, inputs, output):
                layer_outputs[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        hooks = [modules[layer].register_forward_hook(note(layer)) for layer in layers]
        try:
            yield layer_outputs
        finally:
            for hook in hooks:
                hook.remove()

    def layout(self, sequences: list[Sequence], pack_tokens: int, pad_id: int) -> Batch:
        """Return the sequences as a Batch in the layout that this model takes."""
        return packed_batch(sequences, pack_tokens, pad_id) if self.packed else padded_batch(sequences, pad_id)


def finish_logits(config, logits: torch.Tensor) -> torch.Tensor:
    """Return the head's output (..., V) as the family finishes it: Cohere and Granite scale it, Gemma 2 caps it.

    `check_packing` detects a family that does something else.
    """
    config = config.get_text_config()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits


def wrap_model(
    model, formatter: PromptFormatter, prompts: list[str], pack_tokens: int = 256
) -> tuple[AnswerLogitsModel, str]:
    """Try the packed layout on a few real prompts; return (the wrapped model, a line that names its layout)."""
    speed_up(model)
    window = attention_window(model.config)
    longest = formatter.max_prompt_tokens + formatter.longest_answer
    if window and window < longest:  # the packed layout's mask would replace the model's own
        line = f"padded layout: {type(model).__name__} looks back {window} tokens and a row may have {longest}"
        return AnswerLogitsModel(model, packed=False), line
    packed, line = check_packing(
        model, probe_sequences(prompts, formatter), pack_tokens, formatter.tokenizer.pad_token_id
    )
    return AnswerLogitsModel(model, packed=packed), line


@torch.no_grad()
def check_packing(model, sequences: list[Sequence], pack_tokens: int, pad_id: int) -> tuple[bool, str]:
    """Return (whether the packed forward gives this model's own logits, a line that says so).

    Compares both layouts on real sequences. An answer token's error is the root mean square difference of its logits,
    over all of them and over the eight likeliest. The worst token decides, in units of the logits' standard deviation.
    Rounding gives 0.1 in bf16; a model that ignores positions or the mask is off by more than 1. (The largest
    difference of a single logit grows with the vocabulary.)
    """
    device = next(model.parameters()).device
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.25
    padded = padded_batch(sequences, pad_id).to(device)
    packed = packed_batch(sequences, pack_tokens, pad_id).to(device)
    expected = AnswerLogitsModel(model, packed=False)(padded)[padded.target_to_logit].float()  # (M, V)
    try:
        got = AnswerLogitsModel(model, packed=True)(packed)[packed.target_to_logit].float()  # (M, V)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        return False, f"padded layout: {type(model).__name__} does not take the packed one ({reason})"
    off = float("inf")
    if got.shape == expected.shape:
        squared = (got - expected).square()  # (M, V)
        likeliest = expected.topk(8, dim=-1).indices  # (M, 8)
        worst = max(errors.mean(-1).max().item() for errors in (squared, squared.gather(-1, likeliest)))
        off = math.sqrt(worst) / expected.std().item()
    if off <= tolerance:
        return True, f"packed layout: logits equal the padded layout's (worst token off by {off:.1e} of their spread)"
    return False, f"padded layout: the packed one gives {type(model).__name__} other logits (off by {off:.1e})"
