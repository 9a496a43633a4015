"""Who may attend to whom, in a form from which every kernel builds what it needs.

Shape suffixes: B batch, T query sequence, S key sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Visibility(NamedTuple):
    """Who may look at whom: same segment, not later (if causal), nearer than the window (if any).

    positions and segments: int32 [B, T] for queries and [B, S] for keys; segment 0 sees nothing.
    """

    q_positions: jax.Array
    kv_positions: jax.Array
    q_segments: jax.Array
    kv_segments: jax.Array
    causal: bool = True
    window: int = 0  # tokens back that are visible, itself included; 0: all
    kv_prefix: jax.Array | None = None  # int32 [B, S]: 1 on keys that all of their segment sees, also what is before
    # Whether queries and keys are the same rows, each document in one piece and in reading order, so that two tokens of
    # a document are as far apart as their indices: what kernels that go by index need. Not so with a cache.
    in_order: bool = False
    index: jax.Array | None = None  # int32 [B, T]: where each token stands in reading order, if not where it lies
    made: jax.Array | None = None  # the dense mask, where `kernels.prepare` made it for all layers

    def by_index(self) -> "Visibility":
        """The same rule with indices for positions where they serve as well: those also tell whole blocks apart."""
        if not self.in_order:
            return self
        B, T = self.q_positions.shape
        index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T)) if self.index is None else self.index
        return self._replace(q_positions=index, kv_positions=index)

    def only_before(self) -> bool:
        """Whether no query sees a key that lies behind it."""
        return self.causal and self.in_order and self.index is None and self.kv_prefix is None

    def any_seen(self) -> jax.Array:
        """bool [B, T]: whether the query sees any key, from the segments alone."""
        if self.in_order:  # itself, at least
            return self.q_segments > 0
        same = self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        return jnp.any(same & (self.kv_segments[:, None, :] > 0), axis=-1)

    def mask(self) -> jax.Array:
        """bool [B, T, S], True where the query may attend to the key."""
        if self.made is not None:
            return self.made
        q, k = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        sees = (self.q_segments[:, :, None] == self.kv_segments[:, None, :]) & (self.kv_segments[:, None, :] > 0)
        if self.causal:
            sees &= k <= q if self.kv_prefix is None else (k <= q) | (self.kv_prefix[:, None, :] > 0)
        if self.window:
            sees &= q - k < self.window
            if not self.causal:
                sees &= k - q < self.window
        return sees
