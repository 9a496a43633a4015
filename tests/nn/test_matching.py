"""The comparison of layers: against plain numpy, and what it must not depend on."""

import jax.numpy as jnp
import numpy as np

from lmjax.nn.matching import relation_divergence, state_difference

B, T = 2, 5
SEGMENTS = np.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1]], np.int32)


def test_the_difference_of_states_is_a_share_of_the_teachers_squares():
    rng = np.random.default_rng(0)
    x, y, w = (rng.normal(size=s).astype(np.float32) for s in ((3, B, T, 4), (3, B, T, 6), (4, 6)))
    real = SEGMENTS > 0
    want = np.mean([np.sum((x[i] @ w - y[i])[real] ** 2) / np.sum(y[i][real] ** 2)
                    for i in range(3)])
    got = state_difference(*map(jnp.asarray, (x, y, w)), jnp.asarray(real))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert state_difference(jnp.asarray(y), jnp.asarray(y), None, jnp.asarray(real)) == 0
    np.testing.assert_allclose(state_difference(jnp.zeros_like(y), jnp.asarray(y), None,
                                                jnp.asarray(real)), 1.0, rtol=1e-6)


def test_relations_are_those_of_a_loop_over_tokens():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(B, T, 2, 6)).astype(np.float32)  # 2 heads of 6
    y = rng.normal(size=(B, T, 4, 4)).astype(np.float32)  # 4 heads of 4
    for causal in (True, False):
        sums = []
        for b in range(B):
            for t in range(T):
                seen = [s for s in range(T) if SEGMENTS[b, s] == SEGMENTS[b, t] > 0
                        and (s <= t or not causal)]
                for head in range(4 * bool(seen)):
                    logs = []
                    for of in (x, y):
                        parts = of[b].reshape(T, 4, -1)[:, head]
                        scores = parts[seen] @ parts[t] / np.sqrt(parts.shape[-1])
                        logs.append(scores - np.log(np.sum(np.exp(scores))))
                    sums.append(np.sum(np.exp(logs[1]) * (logs[1] - logs[0])))
        got = relation_divergence(jnp.asarray(x), jnp.asarray(y), 4, jnp.asarray(SEGMENTS),
                                  causal=causal)
        np.testing.assert_allclose(got, np.mean(sums), rtol=1e-5)
    same = relation_divergence(jnp.asarray(x), jnp.asarray(x), 4, jnp.asarray(SEGMENTS),
                               causal=True)
    np.testing.assert_allclose(same, 0.0, atol=1e-6)
