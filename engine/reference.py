"""The frozen original: its predictions for the terms that need them, without a second model in memory.

The original's states after the final norm are computed once before the first step, at the answer positions of every
sequence that needs them. A step multiplies them with a frozen copy of the output head, so the KL is exact up to the
precision of the cached states. A model that cannot take the packed layout needs a frozen second model in memory
instead; the log says so.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from data_module import Sequence
from engine.processes import copy_to, full_tensor
from engine.tree import AnswerLogitsModel, finish_logits, packed_batch, padded_batch


class ReferenceCache:
    """The original's `logits` (M, V) and `states` (M, D) at the answer tokens of sequences, in their order."""

    def __init__(
        self, answer_model: AnswerLogitsModel, sequences: list[Sequence], pack_tokens: int, pad_id: int, *,
        layers: tuple[int, ...] = (), progress=None,
    ):  # fmt: skip
        """Cache the states of `sequences` by the model as it is now, before the first step. Repeats cost nothing.

        `layers`: cache the hidden states after these layers as well as the final ones.
        """
        self._pad_id, self._pack_tokens, self._layers = pad_id, pack_tokens, layers
        self._device = next(answer_model.parameters()).device
        self._config = answer_model.model.config
        self._vocabulary = answer_model.model.get_output_embeddings().weight.shape[0]
        # {(prompt, answer): {layer: states (M, D)}}; the layer None stands for the final states
        self._states: dict[tuple, dict[int | None, torch.Tensor]] = {}
        self._model = None
        if not answer_model.packed:
            self._model = AnswerLogitsModel(
                copy.deepcopy(answer_model.model).requires_grad_(False).eval(), packed=False
            )
            return
        self._head = frozen_head(answer_model.model)
        self.precompute(answer_model, sequences, progress)

    def precompute(self, answer_model: AnswerLogitsModel, sequences: list[Sequence], progress=None) -> None:
        """Cache the states of sequences not cached yet, in batches of their own.

        In bf16, results depend slightly on the other rows of a batch, and evaluation rows must not change the training
        targets.
        """
        if not answer_model.packed:
            return
        unique = {
            (s.prompt_ids, s.answer_ids): s for s in sequences if (s.prompt_ids, s.answer_ids) not in self._states
        }
        chunks = _chunks(sorted(unique.values(), key=lambda s: s.length), 8 * self._pack_tokens)
        for chunk in progress(chunks) if progress else chunks:
            self._compute(answer_model, chunk)

    @torch.no_grad()
    def _compute(self, answer_model: AnswerLogitsModel, sequences: list[Sequence]) -> None:
        batch = packed_batch(sequences, self._pack_tokens, self._pad_id).to(self._device)
        out = answer_model(batch, states=True, layers=self._layers)
        by_layer = {None: out[0], **out[1]} if self._layers else {None: out}  # (N, D) each
        by_layer = {layer: states[batch.target_to_logit].cpu() for layer, states in by_layer.items()}  # (M, D) each
        for s, sequence in enumerate(sequences):
            own = (batch.sequence_ids == s).cpu()  # (M,) bool: the answer tokens of this sequence
            self._states[sequence.prompt_ids, sequence.answer_ids] = {k: v[own].clone() for k, v in by_layer.items()}

    @torch.no_grad()
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        """Return the original's logits at each answer token of these sequences, (M, V)."""
        if not sequences:
            return torch.empty(0, self._vocabulary, device=self._device)
        if self._model is not None:
            batch = padded_batch(sequences, self._pad_id).to(self._device)
            return self._model(batch)[batch.target_to_logit]  # (M, V)
        states, (weight, bias) = self._cached(sequences, None), self._head
        logits = F.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))  # (M, V)
        return finish_logits(self._config, logits)

    @torch.no_grad()
    def states(self, sequences: list[Sequence], layer: int) -> torch.Tensor:
        """Return the original's hidden states after `layer` at the place that predicts each answer token, (M, D)."""
        if self._model is not None and sequences:
            batch = padded_batch(sequences, self._pad_id).to(self._device)
            return self._model(batch, layers=(layer,))[1][layer][batch.target_to_logit]
        return self._cached(sequences, layer)

    def _cached(self, sequences: list[Sequence], layer: int | None) -> torch.Tensor:
        width = self._config.get_text_config().hidden_size
        parts = [self._states[s.prompt_ids, s.answer_ids][layer] for s in sequences] or [torch.empty(0, width)]
        return copy_to(self._device, torch.cat(parts))  # (M, D)

    def bytes(self) -> int:
        """Return the memory of the cached states, without the head's copy."""
        tensors = [tensor for by_layer in self._states.values() for tensor in by_layer.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def frozen_head(model) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the output head as it is now: (weight (V, D), bias (V,) or None). What training would move is copied."""
    head = model.get_output_embeddings()
    frozen = []
    for tensor in (head.weight, getattr(head, "bias", None)):
        if tensor is not None:
            copied = full_tensor(tensor.detach())
            tensor = copied.clone() if tensor.requires_grad and copied.data_ptr() == tensor.data_ptr() else copied
        frozen.append(tensor)
    return frozen[0], frozen[1]


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
