"""What torch does slowly on a processor in a step of this suite, done otherwise; the same numbers (docs/LOG.md).

Attention in bf16: torch's fused kernel is made for long rows that need not hold their scores. A packed row has a
few hundred tokens: two batched matrix products and a softmax take 0.4 of its time. All other cases - fp32, a
GPU, answers with a key-value cache, padded rows - go to torch's kernel, as they would without this.

Embeddings that share their weight with the head: their gradient has a few hundred rows that are not zero. These
are added into the head's; torch would make a dense tensor of the vocabulary's size for them, zeros, and add that.

The head on one position of each prompt, while answers begin: torch multiplies a tensor with gaps by a frozen weight
as a batch, for which it copies the weight once a prompt (60 prompts, vocabulary 49,152: 3.1 GiB). Without gaps: once.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_rows"
LONGEST_ROW = 1024  # tokens: beyond it the scores no longer stay in the cache


def short_rows(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **settings):
    """The registered function: query (R, H, T, E), key and value (R, G, T, E), additive mask (R, 1, T, T).

    Returns ((R, T, H, E), None), as transformers' own attention functions do.
    """
    rows, heads, tokens, width = query.shape
    by_products = (
        query.dtype == torch.bfloat16 and query.device.type == "cpu" and dropout == 0.0 and 1 < tokens <= LONGEST_ROW
        and attention_mask is not None and attention_mask.shape == (rows, 1, tokens, tokens)
        and attention_mask.dtype == query.dtype and key.shape[2] == tokens
    )  # fmt: skip
    if not by_products:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    groups = key.shape[1]  # G: every H / G heads share a key
    grouped = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows * groups, -1, width)
    keys, values = key.reshape(rows * groups, tokens, width), value.reshape(rows * groups, tokens, width)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(rows, heads, tokens, tokens)
    weights = (scores + attention_mask).softmax(-1).view(rows * groups, -1, tokens)
    out = torch.bmm(weights, values).view(rows, heads, tokens, width)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, short_rows)
AttentionMaskInterface.register(NAME, sdpa_mask)


def speed_up(model) -> None:
    """Let a model use each of these where it fits; what already runs otherwise stays as it is. Once a model."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(NAME)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # a class of the model's own may scale what it looks up (Gemma); torch's own with a norm or counts does more as well
    plain = type(embeddings) is torch.nn.Embedding and not embeddings.scale_grad_by_freq and embeddings.max_norm is None
    tied = plain and head is not None and head.weight is embeddings.weight
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    # several processes average what autograd itself collects, and a GPU is not slow at this
    if tied and embeddings.weight.device.type == "cpu" and PartialState().num_processes == 1:
        embeddings.register_forward_hook(_rows_of_gradient)


def _rows_of_gradient(embeddings, inputs, output):
    """Forward hook: (R, T, D) cut off from the weight; when its gradient comes, the rows go into the weight's."""
    weight, ids = embeddings.weight, inputs[0].flatten()
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return output

    def add(gradient: torch.Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        moved = ids != (-1 if embeddings.padding_idx is None else embeddings.padding_idx)
        weight.grad.index_add_(0, ids[moved], gradient.flatten(0, 1)[moved].to(weight.grad.dtype))

    rows = output.detach().requires_grad_()
    rows.register_hook(add)
    return rows
