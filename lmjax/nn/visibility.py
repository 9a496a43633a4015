"""Who may attend to whom, in a form from which every kernel builds what it needs.

Shape suffixes: B batch, T query sequence, S key sequence.
"""

from typing import NamedTuple

import jax


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
    made: jax.Array | None = None  # the dense mask, where `kernels.prepare` made it for all layers

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
