"""The chunked kernel: which blocks it visits, and how much memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np

from lmjax.nn.kernels import chunked
from lmjax.nn.kernels.choose import KERNELS, attend
from lmjax.nn.masking import AttentionMask


def test_blocks_that_cannot_be_seen_are_skipped(monkeypatch):
    """Its loops leave out the future, the past beyond the window, and other documents."""
    rows = np.arange(40, dtype=np.int32)[None]
    documents = rows // 20 + 1

    def visited(segments, causal, window):
        x = jnp.zeros((1, 40, 1, 8))
        mask = AttentionMask(rows, rows, segments, segments)
        _, _, _, queries, keys = chunked.split(x, x, x, mask)
        scoring = chunked.Scoring(causal, window, 1.0, 0.0)
        first, end = chunked.visible_blocks(queries, keys, scoring)
        return list(zip(first.tolist(), end.tolist(), strict=True))

    monkeypatch.setattr(chunked, "QUERIES", 5)
    monkeypatch.setattr(chunked, "SCORES", 5 * 4)  # blocks: 5 queries, 4 keys
    ones = np.ones_like(rows)
    assert visited(ones, True, 0) == [(0, (5 * i + 4) // 4 + 1) for i in range(8)]
    assert visited(ones, False, 0) == [(0, 10)] * 8
    assert visited(ones, True, 3) == [
        (max(5 * i - 2, 0) // 4, (5 * i + 4) // 4 + 1) for i in range(8)]
    assert visited(documents, False, 0) == [(0, 5)] * 4 + [(5, 10)] * 4
    assert visited(np.zeros_like(rows), False, 0) == [(0, 0)] * 8


def test_memory_grows_with_the_rows_not_with_their_square():
    def temporaries(kernel, T):
        def loss(q, k, v, rows):
            mask = AttentionMask(rows, rows, rows + 1, rows + 1, in_order=True)
            return jnp.sum(attend(q, k, v, mask, scale=1.0, kernel=KERNELS[kernel]))

        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        compiled = step.lower(x, x, x, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short = temporaries("xla", 2048)
    assert temporaries("xla", 4096) > 3.5 * short
    assert temporaries("chunked", 4096) < 2 * temporaries("chunked", 2048) < short / 4
