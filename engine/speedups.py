"""Faster replacements for operations that torch or transformers run slowly; the numbers stay the same (docs/LOG.md).

Attention on a GPU: torch's flex attention takes the block mask of a packed row (engine/tree_mask.py), and skips the
blocks of places that no token sees. What comes with another mask, such as generation, goes to torch's fused kernel.

Attention in bf16 on a CPU: torch's fused kernel is built for long rows, whose scores it never stores. A packed row has
a few hundred tokens; two batched matrix products and a softmax take 0.4 of the kernel's time. Every other case goes to
torch's kernel: fp32, a GPU, generation with a key-value cache, padded rows.

Embeddings that share their weight with the head: only a few hundred rows of their gradient are not zero. These rows
are added to the head's gradient. Torch would add a dense tensor of the vocabulary's size, filled with zeros.

The head on the last position of each prompt, when generation starts: torch multiplies a non-contiguous tensor by a
frozen weight as a batch, and copies the weight for each prompt (60 prompts, vocabulary 49,152: 3.1 GiB). For a
contiguous tensor there is no such copy.
"""

from __future__ import annotations

import functools

import torch
from accelerate import PartialState
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "short_rows"
BLOCKS = "tree_blocks"  # the same, in a model whose packed rows come with a block mask
LONGEST_ROW = 1024  # tokens; the scores of a longer row do not fit the CPU cache


def short_rows(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **settings):
    """Compute attention: query (R, H, T, E), key and value (R, G, T, E), additive mask (R, 1, T, T).

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
    groups = key.shape[1]  # G: H / G heads share a key
    grouped = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows * groups, -1, width)
    keys, values = key.reshape(rows * groups, tokens, width), value.reshape(rows * groups, tokens, width)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(rows, heads, tokens, tokens)
    weights = (scores + attention_mask).softmax(-1).view(rows * groups, -1, tokens)
    out = torch.bmm(weights, values).view(rows, heads, tokens, width)
    return out.transpose(1, 2), None


_compiled_flex = functools.cache(lambda: torch.compile(flex_attention))


def tree_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **settings):
    """Compute attention as `short_rows` does; a block mask goes to flex attention."""
    if not isinstance(attention_mask, BlockMask):
        return short_rows(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings)
    if settings.get("softcap") is not None or settings.get("s_aux") is not None or dropout:
        raise ValueError("flex attention here has no cap, no sink and no dropout")
    heads, groups = query.shape[1], key.shape[1]
    if heads & (heads - 1):  # the kernel shares keys among a power of two of heads only
        key, value = (tensor.repeat_interleave(heads // groups, dim=1) for tensor in (key, value))
    # a compiled layer compiles it with the rest; uncompiled, it would store all scores
    compiled = query.device.type == "cuda" and not torch.compiler.is_compiling()
    attend = _compiled_flex() if compiled else flex_attention
    out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=key.shape[1] != heads)
    return out.transpose(1, 2), None  # (R, T, H, E)


for _name, _function in ((NAME, short_rows), (BLOCKS, tree_blocks)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)


def takes_blocks(model) -> bool:
    """Say whether the model's packed rows come with a block mask, for flex attention."""
    return getattr(model.config, "_attn_implementation", None) == BLOCKS


def leave_blocks(model) -> None:
    """Switch a model whose attention cannot use a block mask to dense masks."""
    model.set_attn_implementation(NAME)


def speed_up(model) -> None:
    """Switch a model to each replacement that fits it; call it once a model. Other attention settings stay as set."""
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(BLOCKS if next(model.parameters()).device.type == "cuda" else NAME)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    # only torch's own class in its plain form merely looks rows up: Gemma's own class scales them
    plain = type(embeddings) is torch.nn.Embedding and not embeddings.scale_grad_by_freq and embeddings.max_norm is None
    tied = plain and head is not None and head.weight is embeddings.weight
    if head is not None:
        head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    # one CPU process only: several processes average what autograd collects, and a GPU is not slow at this
    if tied and embeddings.weight.device.type == "cpu" and PartialState().num_processes == 1:
        embeddings.register_forward_hook(_rows_of_gradient)


def _rows_of_gradient(embeddings, inputs, output):
    """Detach the output (R, T, D) from the weight (a forward hook); add its gradient to the weight's, row by row."""
    weight, ids = embeddings.weight, inputs[0].flatten()
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return output

    def add(gradient: torch.Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        has_gradient = ids != (-1 if embeddings.padding_idx is None else embeddings.padding_idx)
        weight.grad.index_add_(0, ids[has_gradient], gradient.flatten(0, 1)[has_gradient].to(weight.grad.dtype))

    rows = output.detach().requires_grad_()
    rows.register_hook(add)
    return rows
