"""The frozen original: what it predicts on the normal rows, without a second model in memory.

The original's states after the final norm, at the answer positions of every normal sequence that
the run will visit, are computed once before the first step. A step multiplies them with a frozen
copy of the output head, so the KL is exact up to the precision in which they are kept.
Where the packed forward is not possible, a frozen second model is kept instead, and the log says so.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from data_module import Sequence
from engine.processes import copy_to, full_tensor
from engine.tree import AnswerLogitsModel, finish_logits, packed_batch, padded_batch


class ReferenceCache:
    """`logits(sequences)` gives the original's logits (M, V) for the answer tokens, sequence after sequence."""

    def __init__(
        self, forward: AnswerLogitsModel, sequences: list[Sequence], pack_tokens: int, pad_id: int, progress=None
    ):
        """Visit `sequences` (repeats cost nothing) with the model as it is now, before the first step."""
        self._pad_id, self._pack_tokens = pad_id, pack_tokens
        self._device = next(forward.parameters()).device
        self._config = forward.model.config
        self._vocabulary = forward.model.get_output_embeddings().weight.shape[0]
        self._states: dict[tuple, torch.Tensor] = {}
        self._model = None
        if not forward.packed:
            self._model = AnswerLogitsModel(copy.deepcopy(forward.model).requires_grad_(False).eval(), packed=False)
            return
        self._head = frozen_head(forward.model)
        self.precompute(forward, sequences, progress)

    def precompute(self, forward: AnswerLogitsModel, sequences: list[Sequence], progress=None) -> None:
        """Keep the states of more sequences, apart from those that are kept already: who shares a batch shares its
        rounding, and what a run looks at must not change what it learns."""
        if not forward.packed:
            return
        unique = {
            (s.prompt_ids, s.answer_ids): s for s in sequences if (s.prompt_ids, s.answer_ids) not in self._states
        }
        chunks = _chunks(sorted(unique.values(), key=lambda s: s.length), 8 * self._pack_tokens)
        for chunk in progress(chunks) if progress else chunks:
            self._visit(forward, chunk)

    @torch.no_grad()
    def _visit(self, forward: AnswerLogitsModel, sequences: list[Sequence]) -> None:
        batch = packed_batch(sequences, self._pack_tokens, self._pad_id).to(self._device)
        states = forward(batch, states=True)[batch.target_to_logit].cpu()  # (M, D)
        for s, sequence in enumerate(sequences):
            self._states[sequence.prompt_ids, sequence.answer_ids] = states[(batch.sequence_ids == s).cpu()].clone()

    @torch.no_grad()
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        if not sequences:
            return torch.empty(0, self._vocabulary, device=self._device)
        if self._model is not None:
            batch = padded_batch(sequences, self._pad_id).to(self._device)
            return self._model(batch)[batch.target_to_logit]  # (M, V)
        states = torch.cat([self._states[s.prompt_ids, s.answer_ids] for s in sequences])  # (M, D)
        weight, bias = self._head
        states = copy_to(self._device, states)
        logits = F.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))  # (M, V)
        return finish_logits(self._config, logits)

    def bytes(self) -> int:
        """Memory of the kept states (the head's copy not counted)."""
        return sum(state.numel() * state.element_size() for state in self._states.values())


def frozen_head(model) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight (V, D), bias (V,) or None) of the output head as it is now; a copy where training would move it."""
    head = model.get_output_embeddings()
    found = []
    for tensor in (head.weight, getattr(head, "bias", None)):
        if tensor is not None:
            copied = full_tensor(tensor.detach())
            tensor = copied.clone() if tensor.requires_grad and copied.data_ptr() == tensor.data_ptr() else copied
        found.append(tensor)
    return found[0], found[1]


def _chunks(sequences: list[Sequence], tokens: int) -> list[list[Sequence]]:
    chunks, filled = [[]], 0
    for sequence in sequences:
        if chunks[-1] and filled + sequence.length > tokens:
            chunks.append([])
            filled = 0
        chunks[-1].append(sequence)
        filled += sequence.length
    return [chunk for chunk in chunks if chunk]
