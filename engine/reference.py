"""The frozen original: its predictions for the terms that need them, without a second model in memory.

The original's states after the final norm are computed once before the first step, at the answer positions of every
sequence that needs them. A step multiplies them with a frozen copy of the output head, so the KL is exact up to the
precision of the cached states. They stay on the device where they fit: a step then takes them by an index, which the
host makes. A model that cannot take the packed layout needs a frozen second model in memory instead; the log says so.
"""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import torch

from data_module import Sequence
from engine.head import FrozenHead
from engine.host_copy import copied
from engine.layout import Batch, padded_batch
from engine.processes import full_tensor
from engine.tree import AnswerLogitsModel

DEVICE_SHARE = 0.1  # of the device's memory that cached states may take; beyond it they stay in main memory
GPU_CHUNK = 16384  # tokens of a forward that caches states on a GPU


@dataclasses.dataclass
class CachedTokens:
    """The original's states at M answer tokens: all cached `states` (C, D), and the tokens' `places` (M,) in them."""

    states: torch.Tensor
    places: torch.Tensor
    head: FrozenHead

    def at(self, tokens) -> CachedTokens:
        """Return those of some tokens, given as an index."""
        return dataclasses.replace(self, places=self.places[tokens])

    def logits(self, part: slice) -> torch.Tensor:
        """Return the original's logits (n, V) at a slice of the tokens."""
        return self.head.logits(self.states[self.places[part]])

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a token."""
        return self.head.weight.shape[0]

    def taken(self) -> torch.Tensor:
        """Return the states (M, D)."""
        return self.states[self.places]

    def gathered(self) -> CachedTokens:
        """Return the same; if all states lie in main memory, with a copy of the rows that are needed."""
        if self.states.device.type != "cpu":
            return self
        return dataclasses.replace(self, states=self.taken(), places=torch.arange(len(self.places)))


@dataclasses.dataclass
class ModelTokens:
    """The same from a second model, which runs when they are asked for; `tokens` (M,): places among the batch's."""

    model: AnswerLogitsModel
    batch: Batch
    tokens: torch.Tensor
    layer: int | None = None  # whose states `taken` gives
    computed: torch.Tensor | None = None  # (M, V)

    def at(self, tokens) -> ModelTokens:
        """Return those of some tokens, given as an index."""
        return dataclasses.replace(self, tokens=self.tokens[tokens])

    @torch.no_grad()
    def logits(self, part: slice) -> torch.Tensor:
        """Return the original's logits (n, V) at a slice of the tokens."""
        if self.computed is None:
            self.computed = self.model(self.batch)[self.batch.target_to_logit[self.tokens]]
        return self.computed[part]

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a token."""
        return self.model.model.get_output_embeddings().weight.shape[0]

    @torch.no_grad()
    def taken(self) -> torch.Tensor:
        """Return the states (M, D) after `layer`."""
        states = self.model(self.batch, layers=(self.layer,))[1][self.layer]
        return states[self.batch.target_to_logit[self.tokens]]


class ReferenceCache:
    """The original's logits and states at the answer tokens of sequences, in their order."""

    def __init__(
        self, answer_model: AnswerLogitsModel, sequences: list[Sequence], pack_tokens: int, pad_id: int, *,
        layers: tuple[int, ...] = (), progress=None,
    ):  # fmt: skip
        """Cache the states of `sequences` by the model as it is now, before the first step. Repeats cost nothing.

        Of a sequence with counterparts, those of the counterparts.

        `layers`: cache the hidden states after these layers as well as the final ones.
        """
        self._pad_id, self._pack_tokens, self._layers = pad_id, pack_tokens, layers
        self.device = next(answer_model.parameters()).device
        self._width = answer_model.model.config.get_text_config().hidden_size
        self._places: dict[tuple, tuple[int, int]] = {}  # {(prompt, answer): (first row, rows) in the cache}
        self._count = 0  # C
        self._states: dict[int | None, torch.Tensor] = {}  # {layer: (C, D)}; the layer None stands for the final states
        self._model = None  # the second model of the padded layout
        if not answer_model.packed:
            self._model = AnswerLogitsModel(
                copy.deepcopy(answer_model.model).requires_grad_(False).eval(), packed=False
            )
        self._head = frozen_head(answer_model.model)
        self.precompute(answer_model, sequences, progress)

    def precompute(self, answer_model: AnswerLogitsModel, sequences: list[Sequence], progress=None) -> None:
        """Cache the states of sequences not cached yet, in batches of their own.

        In bf16, results depend slightly on the other rows of a batch, and evaluation rows must not change the training
        targets.
        """
        if not answer_model.packed:
            return
        asked = [other for s in sequences for other in s.for_original()]
        unique = {(s.prompt_ids, s.answer_ids): s for s in asked if (s.prompt_ids, s.answer_ids) not in self._places}
        tokens = 8 * self._pack_tokens if self.device.type == "cpu" else GPU_CHUNK
        chunks = _chunks(sorted(unique.values(), key=lambda s: s.length), tokens)
        parts = {layer: [cached] for layer, cached in self._states.items()}
        home = self._home(unique.values())
        for chunk in progress(chunks) if progress else chunks:
            for layer, states in self._compute(answer_model, chunk).items():
                parts.setdefault(layer, []).append(states.to(home))
            for sequence in chunk:
                self._places[sequence.prompt_ids, sequence.answer_ids] = (self._count, len(sequence.answer_ids))
                self._count += len(sequence.answer_ids)
        for layer in list(parts):
            self._states[layer] = torch.cat([part.to(home) for part in parts.pop(layer)])

    def _home(self, added) -> torch.device:
        """Return where the states lie once those of the sequences `added` are cached: the device, if they fit."""
        if self.device.type != "cuda":
            return torch.device("cpu")
        rows = self._count + sum(len(s.answer_ids) for s in added)
        total = torch.cuda.get_device_properties(self.device).total_memory
        size = rows * self._width * 4 * (1 + len(self._layers))
        return self.device if size <= DEVICE_SHARE * total else torch.device("cpu")

    @torch.no_grad()
    def _compute(self, answer_model: AnswerLogitsModel, sequences: list[Sequence]) -> dict[int | None, torch.Tensor]:
        """Return {layer: states (M, D)} at the answer tokens of the sequences."""
        batch = answer_model.layout(sequences, self._pack_tokens, self._pad_id).to(self.device)
        out = answer_model(batch, states=True, layers=self._layers)
        by_layer = {None: out[0], **out[1]} if self._layers else {None: out}  # (N, D) each
        return {layer: states[batch.target_to_logit] for layer, states in by_layer.items()}

    # ---- what a step takes
    def places(self, sequences: list[Sequence]) -> torch.Tensor:
        """Return the rows of the cache that hold the answer tokens of these sequences, (M,), in main memory.

        A token that none stands for gets the first one's row, which no term reads.
        """
        rows = [self._rows_of(sequence)[_places_asked(sequence)] for sequence in sequences]
        return torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64))

    def _rows_of(self, sequence: Sequence) -> np.ndarray:
        """Return the rows of the cache that hold the tokens of what the original was asked about a sequence."""
        found = [self._places[other.prompt_ids, other.answer_ids] for other in sequence.for_original()]
        return np.concatenate([np.arange(first, first + count) for first, count in found])

    def original(self, sequences: list[Sequence], layer: int | None = None) -> CachedTokens | ModelTokens:
        """Return the original's predictions, or its states after `layer`, at each answer token of these sequences.

        It is made in main memory: no device is waited for.
        """
        if self._model is not None and sequences:
            asked = [s.for_original() for s in sequences]
            batch = padded_batch([other for of_one in asked for other in of_one], self._pad_id)
            lengths = [sum(len(other.answer_ids) for other in of_one) for of_one in asked]
            starts = np.cumsum(lengths) - lengths  # (S,)
            tokens = [start + _places_asked(s) for s, start in zip(sequences, starts, strict=True)]
            return ModelTokens(self._model, batch, torch.from_numpy(np.concatenate(tokens)), layer)
        states = self._states[layer] if sequences else torch.empty(0, self._width)
        return CachedTokens(states, self.places(sequences), self._head)

    @torch.no_grad()
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        """Return the original's logits at each answer token of these sequences, (M, V)."""
        if not sequences:
            return torch.empty(0, self._head.weight.shape[0], device=self.device)
        return copied(self.original(sequences), self.device).logits(slice(None))

    def bytes(self) -> int:
        """Return the memory of the cached states, without the head's copy."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._states.values())


def _places_asked(sequence: Sequence) -> np.ndarray:
    """Return (M,): the place that the original is asked about for each answer token of a sequence."""
    return np.maximum(np.array(sequence.original_places, dtype=np.int64), 0)


def frozen_head(model) -> FrozenHead:
    """Return the output head as it is now. What training would move is copied."""
    head = model.get_output_embeddings()
    frozen = []
    for tensor in (head.weight, getattr(head, "bias", None)):
        if tensor is not None:
            copied = full_tensor(tensor.detach())
            tensor = copied.clone() if tensor.requires_grad and copied.data_ptr() == tensor.data_ptr() else copied
        frozen.append(tensor)
    return FrozenHead(*frozen, model.config)


def _chunks(sequences: list[Sequence], tokens: int) -> list[list[Sequence]]:
    """Cut a list of sequences into chunks of at most `tokens` tokens, or of one sequence."""
    chunks, filled = [[]], 0
    for sequence in sequences:
        if chunks[-1] and filled + sequence.length > tokens:
            chunks.append([])
            filled = 0
        chunks[-1].append(sequence)
        filled += sequence.length
    return [chunk for chunk in chunks if chunk]
