"""Compiled decoder layers: on a GPU, one compiled kernel takes the place of several elementwise ones, and of launches.

All layers share one compiled graph, in which the number of tokens is a variable. Only packed rows with a block mask run
compiled; generation and padded rows run the layers as they are.
"""

from __future__ import annotations

import contextlib

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn.attention.flex_attention import BlockMask

from engine.adapters import decoder_layers
from engine.kernels import fuse_kernels
from engine.processes import is_sharded
from engine.speedups import takes_blocks
from engine.tree_mask import BLOCK

_unchecked: list[bool] = []  # not empty: in a step whose graphs are known
NARROW, WIDE = 2 * BLOCK, 32_768  # places of a row
SHORTEST_RUN = 500  # steps; a shorter run is over sooner without the warm-up, which takes up to a minute
GRAPHS = 64  # at most: with and without gradient, before and after the number of tokens has become a variable


def why_not_compiled(model, choice: str, steps: int) -> str | None:
    """Return why the layers of a model stay as they are, or None; choice: auto, on or off; steps: of the run."""
    if choice == "off":
        return "--compile off"
    if is_sharded(model):
        return "--shard gathers each layer as it runs"
    if not takes_blocks(model):
        return "that is for packed rows on a CUDA GPU with flex attention"
    if choice == "auto" and steps < SHORTEST_RUN:
        return f"the run has fewer than {SHORTEST_RUN} steps"
    return None


def compile_layers(model, *, leave: tuple[int, ...] = (), backend: str = "inductor") -> None:
    """Compile the layers of a model whose packed rows come with a block mask; the first call of each kind compiles.

    leave: layers whose outputs are read by hooks, which a compiled layer would not call.
    """
    # The backward makes the norms' and activations' outputs again: a few per cent of its time, a fifth of the memory.
    functorch_config.ban_recompute_used_far_apart = False
    functorch_config.ban_recompute_long_fusible_chains = False
    functorch_config.ban_recompute_materialized_backward = False
    inductor_config.size_asserts = False  # checks of every input in every call
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    fuse_kernels()
    for number, layer in enumerate(decoder_layers(model)[1]):
        if number not in leave:
            layer._compiled_call_impl = _for_blocks(layer, torch.compile(layer._call_impl, backend=backend))


class KnownGraphs:
    """The widths that a run's forwards and backwards have met.

    Once there are two, the width is a variable, and no graph is compiled any more. The checks that a graph fits its
    layer, a third of a small step's time, are then left out, if `trusted` (run/warm_up.py tries it first).
    """

    def __init__(self, *, trusted: bool = False):
        self.widths: set[int] = set()
        self.trusted = trusted

    @contextlib.contextmanager
    def of(self, batch):
        """Run a batch's forward and backward inside. What tells the graphs apart is checked always, such as the width.

        The same adapters must be on in all of them. Rows of a block or two, and rows beyond 32-bit indices, may be
        graphs of their own, so they are checked in full.
        """
        width = 0 if batch.ends is None else batch.ends.shape[1]
        if not NARROW < width <= WIDE:
            yield
        elif len(self.widths) < 2 or not self.trusted:
            yield
            self.widths.add(width)
        else:
            _unchecked.append(True)
            try:
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=True):
                    yield
            finally:
                _unchecked.pop()


def decompile_layers(model) -> None:
    """Let the layers run as they are again."""
    for layer in decoder_layers(model)[1]:
        layer._compiled_call_impl = None


def _for_blocks(layer: torch.nn.Module, compiled):
    """Return what `layer(...)` calls: its compiled form for packed rows with a block mask, else its own."""

    def call(*args, **kwargs):
        if not any(isinstance(value, BlockMask) for value in (*args, *kwargs.values())):
            return layer._call_impl(*args, **kwargs)
        for value in (*args, *kwargs.values()) if not _unchecked else ():
            mark_tokens(value)
        return compiled(*args, **kwargs)

    return call


def mark_tokens(value) -> None:
    """Mark the axis of the tokens (1, T, ...) of a layer's inputs as variable, so that one graph serves all widths."""
    if isinstance(value, tuple | list):
        for part in value:
            mark_tokens(part)
    elif isinstance(value, torch.Tensor) and value.dim() >= 2 and value.shape[1] > 1:
        torch._dynamo.maybe_mark_dynamic(value, 1)
