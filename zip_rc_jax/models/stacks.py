"""Which layers share one stacked parameter array, so that a model of mixed layer types is still a
few scans.

Layers of one type could be stacked in one array, but a scan must then pick its slices dynamically.
Instead the sequence of layer types is cut into segments that repeat a pattern: Gemma's five sliding
layers and a full one, four times over, then two sliding ones. A segment is one scan; its body
applies the layers of the pattern one after the other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from zip_rc_jax.config import ModelConfig

# How many axes of a kernel, after "layers", are inputs.
KERNELS = {
    "q": 1,
    "k": 1,
    "v": 1,
    "o": 2,
    "gate": 1,
    "up": 1,
    "down": 1,
    "conv_in": 1,
    "conv_out": 1,
}


@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of one type whose parameters share arrays with a leading axis "layers".

    Attributes:
      name: key of the stack among the parameters and in the cache.
      kind: layer type.
      layers: their numbers in the model, ascending.
    """

    name: str
    kind: str
    layers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive layers that repeat a pattern; `stacks[i]` holds every repeat's layer `i`, so all
    stacks are equally long."""

    stacks: tuple[Stack, ...]

    @property
    def repeats(self) -> int:
        return len(self.stacks[0].layers)


@functools.cache
def segments(kinds: tuple[str, ...], unrolled: bool = False) -> tuple[Segment, ...]:
    """The cut of the layer types with the fewest stacks (what is compiled), and then the fewest
    segments.

    Args:
      kinds: type of every layer.
      unrolled: every layer is a segment of its own instead. More is compiled, but no layer is
        sliced from an array of many: XLA on CPU copies such slices at every step.
    """
    if unrolled:
        return tuple(Segment((Stack(f"{i}_{kind}", kind, (i,)),)) for i, kind in enumerate(kinds))
    count = len(kinds)
    # best[i]: (stacks, segments, pattern length, repeats) for the layers from i on.
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (count + 1)
    for start in reversed(range(count)):
        options = []
        for length in range(1, count - start + 1):
            repeats = 1
            while True:
                after = best[start + length * repeats]
                options.append((length + after[0], 1 + after[1], length, repeats))
                begin = start + length * repeats
                if kinds[begin : begin + length] != kinds[start : start + length]:
                    break
                repeats += 1
        # of equal cuts, long segments first
        best[start] = min(options, key=lambda o: (o[0], o[1], -o[2] * o[3]))
    segments: list[Segment] = []
    start = number = 0
    while start < count:
        _, _, length, repeats = best[start]
        stacks = []
        for offset in range(length):
            first, kind = start + offset, kinds[start + offset]
            stacks.append(
                Stack(
                    f"{number}_{kind}", kind, tuple(range(first, start + length * repeats, length))
                )
            )
            number += 1
        segments.append(Segment(tuple(stacks)))
        start += length * repeats
    return tuple(segments)


def unstack(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """A copy whose layers have arrays of their own, `[1, *out, *in]` for kernels: for a forward
    with `unrolled=True`.

    For CPU, where XLA copies the slices that a scan takes from stacked arrays, and when decoding
    prefers kernels with the outputs in front.
    """

    def layer(name: str, stacked: jax.Array, i: int) -> jax.Array:
        x = stacked[i : i + 1]
        inputs = KERNELS.get(name, 0)
        return jnp.moveaxis(x, range(1, 1 + inputs), range(-inputs, 0)) if inputs else x

    blocks = {}
    for stack in (stack for segment in segments(config.kinds) for stack in segment.stacks):
        for i, number in enumerate(stack.layers):
            blocks[f"{number}_{stack.kind}"] = {
                name: layer(name, x, i) for name, x in params["blocks"][stack.name].items()
            }
    return {**params, "blocks": blocks}


def restack(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """What `unstack` was given, from what it returned."""

    def stacked(name: str, layers: list[jax.Array]) -> jax.Array:
        x, inputs = jnp.concatenate(layers), KERNELS.get(name, 0)
        return jnp.moveaxis(x, range(-inputs, 0), range(1, 1 + inputs)) if inputs else x

    blocks = {}
    for stack in (stack for segment in segments(config.kinds) for stack in segment.stacks):
        layers = [params["blocks"][f"{number}_{stack.kind}"] for number in stack.layers]
        blocks[stack.name] = {
            name: stacked(name, [layer[name] for layer in layers]) for name in layers[0]
        }
    return {**params, "blocks": blocks}
