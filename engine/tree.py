"""A step's forward on packed trees (engine/layout.py), for models that take them; the padded layout for the others.

`AnswerLogitsModel` returns the same logits for both layouts.
Letters: R rows, T places a row, D hidden size, V vocabulary, N logit rows, M answer tokens.
"""

from __future__ import annotations

import contextlib
import math

import torch

from data_module import Sequence, probe_sequences
from engine.adapters import decoder_layers
from engine.head import OutputHead, finish_logits
from engine.layout import Batch, packed_batch, padded_batch
from engine.processes import is_sharded
from engine.speedups import leave_blocks, speed_up, takes_blocks
from engine.token_values import TokenRequest, token_values, weighted_values
from engine.tree_mask import block_mask, dense_mask
from prompts.formatter import PromptFormatter
from utils import attention_window, log


# ------------------------------------------------------------------------------------------ the forward
class AnswerLogitsModel(torch.nn.Module):
    """The model as the loop calls it: takes a batch, returns logits (N, V) or token losses at the answer positions.

    It is a module of its own, so that a wrapper for several processes sees one forward a step.
    """

    def __init__(self, model, *, packed: bool):
        super().__init__()
        self.model = model
        self.packed = packed
        self.dtype = None  # of the layers, if the parameters have another type

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Return the states after the final norm at the answer positions, (N, D). Packed layout only."""
        if takes_blocks(self.model):
            mask = block_mask(batch.ends)
        else:
            sees = dense_mask(batch.ends)  # (R, 1, T, T)
            mask = torch.zeros(sees.shape, dtype=self.dtype or self.model.dtype, device=sees.device)
            mask.masked_fill_(~sees, torch.finfo(mask.dtype).min)  # added to the scores
        body = self.model.base_model
        out = body(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False)
        states = out[0]  # (R, T, D)
        return states.flatten(0, 1).index_select(0, batch.logit_positions)  # (N, D)

    @property
    def generator(self) -> torch.nn.Module:
        """The module that generates answers: the model, or this module if the model is sharded, since it gathers it."""
        return self if is_sharded(self) else self.model

    def generate(self, **settings):
        return self.model.generate(**settings)

    def forward(
        self, batch: Batch, requests: list[TokenRequest] | None = None, weights: list | None = None, *,
        states: bool = False, layers: tuple[int, ...] = (),
    ):  # fmt: skip
        """Return logits (N, V), or the states of `hidden` (N, D) with `states`.

        With `requests`, return (total, values), as `weighted_values` does if the `weights` are given; without them,
        total is None and the gradient flows through the values. With `layers`, return (all that, {layer: hidden states
        after it, (N, D)}). Every forward of a sharded model passes here.
        """
        with self._captured(layers) as captured:
            if states:
                out = self.hidden(batch)
            elif self.packed and requests is not None:
                out = _values(self.hidden(batch), requests, weights, OutputHead(self.model))
            elif self.packed:
                out = finish_logits(self.model.config, self.model.get_output_embeddings()(self.hidden(batch)))  # (N, V)
            else:
                output = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
                out = output.logits.flatten(0, 1)[batch.logit_positions]  # (R, T, V) -> (N, V)
                out = out if requests is None else _values(out, requests, weights)
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
        """Return the sequences as a Batch in the layout that this model takes.

        Flex attention skips what a token does not see, so its trees share one row, whatever `pack_tokens` is.
        """
        if not self.packed:
            return padded_batch(sequences, pad_id)
        return packed_batch(sequences, pack_tokens, pad_id, one_row=takes_blocks(self.model))


def _values(states: torch.Tensor, requests: list[TokenRequest], weights: list | None, *head):
    """Return (total, values) as `AnswerLogitsModel.forward` does."""
    if weights is not None:
        return weighted_values(states, requests, weights, *head)
    return None, token_values(states, requests, *head)


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
    probe = probe_sequences(prompts, formatter), pack_tokens, formatter.tokenizer.pad_token_id
    packed, line = check_packing(model, *probe)
    if not packed and takes_blocks(model):
        log.info("flex attention: %s", line)
        leave_blocks(model)
        packed, line = check_packing(model, *probe)
    return AnswerLogitsModel(model, packed=packed), line + (
        ", flex attention" if packed and takes_blocks(model) else ""
    )


@torch.no_grad()
def check_packing(model, sequences: list[Sequence], pack_tokens: int, pad_id: int) -> tuple[bool, str]:
    """Return (whether the packed forward gives this model's own logits, a line that says so).

    Compares both layouts on real sequences. An answer token's error is the root mean square difference of its logits,
    over all of them and over the eight likeliest. The worst token decides, in units of the logits' standard deviation.
    Rounding gives 0.1 in bf16; a model that ignores positions or the mask is off by more than 1. (The largest
    difference of a single logit grows with the vocabulary.)
    """
    device = next(model.parameters()).device
    tolerance = 0.25
    if model.dtype == torch.float32:
        tolerance = 1e-3 if device.type == "cpu" else 0.02  # a GPU's kernels may round products to TF32
    padded = padded_batch(sequences, pad_id).to(device)
    packed = AnswerLogitsModel(model, packed=True).layout(sequences, pack_tokens, pad_id).to(device)
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
