"""The attention mask, described by positions and segments from which every kernel builds its own.

Shape suffixes: B batch, T query sequence, S key sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class AttentionMask(NamedTuple):
    """Which query attends to which key: the rule, and the positions and segments it is applied to.

    A query attends to a key of the same segment that does not come later (if `causal`) and lies
    within `window`. Segment 0 is padding: its queries and keys attend to nothing.
    """

    q_positions: jax.Array  # int32 [B, T]
    kv_positions: jax.Array  # int32 [B, S]
    q_segments: jax.Array  # int32 [B, T]
    kv_segments: jax.Array  # int32 [B, S]
    causal: bool = True
    window: int = 0  # a query sees keys fewer than `window` positions away; 0: no limit
    kv_prefix: jax.Array | None = None  # int32 [B, S]: 1 on keys that earlier queries see as well
    # Whether queries and keys are the same rows, with each document in one piece and in reading
    # order. Then two tokens of a document are as far apart as their indices are, which kernels
    # that mask by index rely on. False with a key/value cache.
    in_order: bool = False
    # int32 [B, T]: each token's index in reading order; None where the rows lie in that order.
    reading_index: jax.Array | None = None
    # The result of `to_dense`, if `kernels.choose.prepare` has computed it.
    dense: jax.Array | None = None

    def by_index(self) -> "AttentionMask":
        """The same mask with indices for positions, if rows are in order.

        Indices also order tokens of different documents, so whole blocks can be skipped by them.
        """
        if not self.in_order:
            return self
        index = self.reading_index
        if index is None:
            B, T = self.q_positions.shape
            index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        return self._replace(q_positions=index, kv_positions=index)

    def hides_later_keys(self) -> bool:
        """Whether no query attends to a key at a greater index than its own."""
        in_place = self.in_order and self.reading_index is None
        return self.causal and in_place and self.kv_prefix is None

    def sees_any_key(self) -> jax.Array:
        """bool [B, T]: whether any key has the query's segment; other rules are not considered."""
        if self.in_order:  # every query has itself as a key
            return self.q_segments > 0
        return jnp.any(self._same_segment(), axis=-1)

    def to_dense(self) -> jax.Array:
        """bool [B, T, S], True where the query attends to the key."""
        if self.dense is not None:
            return self.dense
        q, k = self.q_positions[:, :, None], self.kv_positions[:, None, :]
        mask = self._same_segment()
        if self.causal:
            prefix = self.kv_prefix
            mask &= k <= q if prefix is None else (k <= q) | (prefix[:, None, :] > 0)
        if self.window:
            mask &= q - k < self.window
            if not self.causal:
                mask &= k - q < self.window
        return mask

    def _same_segment(self) -> jax.Array:
        """bool [B, T, S]: whether query and key are of the same segment, and not padding."""
        same = self.q_segments[:, :, None] == self.kv_segments[:, None, :]
        return same & (self.kv_segments[:, None, :] > 0)
