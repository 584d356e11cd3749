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
    """What the original says at the answer tokens, sequence after sequence: `logits` (M, V), `states` (M, D)."""

    def __init__(
        self, forward: AnswerLogitsModel, sequences: list[Sequence], pack_tokens: int, pad_id: int, *,
        layers: tuple[int, ...] = (), progress=None,
    ):  # fmt: skip
        """Visit `sequences` (repeats cost nothing) with the model as it is now, before the first step.

        `layers`: those whose hidden states are kept as well as the final ones.
        """
        self._pad_id, self._pack_tokens, self._layers = pad_id, pack_tokens, layers
        self._device = next(forward.parameters()).device
        self._config = forward.model.config
        self._vocabulary = forward.model.get_output_embeddings().weight.shape[0]
        # by (prompt, answer): what is kept of a sequence, (M, D) each; the key None is the final states
        self._states: dict[tuple, dict[int | None, torch.Tensor]] = {}
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
        out = forward(batch, states=True, layers=self._layers)
        kept = {None: out[0], **out[1]} if self._layers else {None: out}  # (N, D) each
        kept = {layer: states[batch.target_to_logit].cpu() for layer, states in kept.items()}  # (M, D) each
        for s, sequence in enumerate(sequences):
            mine = (batch.sequence_ids == s).cpu()
            self._states[sequence.prompt_ids, sequence.answer_ids] = {k: v[mine].clone() for k, v in kept.items()}

    @torch.no_grad()
    def logits(self, sequences: list[Sequence]) -> torch.Tensor:
        if not sequences:
            return torch.empty(0, self._vocabulary, device=self._device)
        if self._model is not None:
            batch = padded_batch(sequences, self._pad_id).to(self._device)
            return self._model(batch)[batch.target_to_logit]  # (M, V)
        states, (weight, bias) = self._kept(sequences, None), self._head
        logits = F.linear(states, weight.to(states.dtype), None if bias is None else bias.to(states.dtype))  # (M, V)
        return finish_logits(self._config, logits)

    @torch.no_grad()
    def states(self, sequences: list[Sequence], layer: int) -> torch.Tensor:
        """The original's hidden states after `layer`, where each answer token is predicted: (M, D)."""
        if self._model is not None and sequences:
            batch = padded_batch(sequences, self._pad_id).to(self._device)
            return self._model(batch, layers=(layer,))[1][layer][batch.target_to_logit]
        return self._kept(sequences, layer)

    def _kept(self, sequences: list[Sequence], layer: int | None) -> torch.Tensor:
        width = self._config.get_text_config().hidden_size
        parts = [self._states[s.prompt_ids, s.answer_ids][layer] for s in sequences] or [torch.empty(0, width)]
        return copy_to(self._device, torch.cat(parts))  # (M, D)

    def bytes(self) -> int:
        """Memory of the kept states (the head's copy not counted)."""
        tensors = [tensor for kept in self._states.values() for tensor in kept.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
