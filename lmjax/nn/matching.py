"""How far a student's layers are from its teacher's: hidden states and relations of attention.

Shape suffixes: L layers, B batch, T sequence, D and E embed_dim of student and teacher, H heads,
K head_dim, R relation heads, F width of a relation head.
"""

import jax
import jax.numpy as jnp


def state_difference(student_LBTD: jax.Array, teacher_LBTE: jax.Array,
                     projection_DE: jax.Array | None, real_BT: jax.Array) -> jax.Array:
    """The squared difference of hidden states as a share of the teacher's squares, float32 scalar.

    It is 0 if the states are equal, and 1 if the student's are 0. A trained projection maps the
    student's states to the teacher's width (Jiao et al. 2019, TinyBERT, arXiv:1909.10351).

    Args:
      student_LBTD, teacher_LBTE: of the layers that are compared.
      projection_DE: None: the widths are the same.
      real_BT: which tokens are not padding.
    """
    x, y = student_LBTD.astype(jnp.float32), teacher_LBTE.astype(jnp.float32)
    x = x if projection_DE is None else x @ projection_DE.astype(jnp.float32)
    real = real_BT[None, :, :, None].astype(jnp.float32)
    apart_L, size_L = (jnp.sum(jnp.square(z) * real, axis=(1, 2, 3)) for z in (x - y, y))
    return jnp.mean(apart_L / jnp.maximum(size_L, 1e-9))


def relation_divergence(student_BTHK: jax.Array, teacher_BTHK: jax.Array, heads: int,
                        segments_BT: jax.Array, *, causal: bool) -> jax.Array:
    """The divergence of two models' self-relations of queries, keys or values, in nats per token.

    A relation head is an equal part of all heads side by side. Its relations are the softmax of the
    scaled products of every token's part with those of the tokens that it sees, so that the models
    may have other numbers and sizes of heads (Wang et al. 2020, MiniLMv2, arXiv:2012.15828).

    Args:
      student_BTHK, teacher_BTHK: the same of queries, keys or values of each.
      heads: R, which divides H * K of both.
      segments_BT: tokens of one document have one number; 0: padding.
      causal: whether tokens see only earlier ones.
    """
    sees_BTS = (segments_BT[:, :, None] == segments_BT[:, None, :]) & (segments_BT[:, :, None] > 0)
    if causal:
        T = segments_BT.shape[1]
        sees_BTS &= jnp.tril(jnp.ones((T, T), bool))[None]

    def relations(x_BTHK: jax.Array) -> jax.Array:
        B, T = x_BTHK.shape[:2]
        x_BTRF = x_BTHK.reshape(B, T, heads, -1)
        scores = jnp.einsum("BTRF,BSRF->BRTS", x_BTRF, x_BTRF, preferred_element_type=jnp.float32)
        scores = jnp.where(sees_BTS[:, None], scores * x_BTRF.shape[-1] ** -0.5, -1e9)
        return jax.nn.log_softmax(scores)

    log_q, log_p = relations(student_BTHK), relations(teacher_BTHK)
    each_BT = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), axis=1)
    real_BT = (segments_BT > 0).astype(jnp.float32)
    return jnp.sum(each_BT * real_BT) / jnp.maximum(jnp.sum(real_BT), 1.0)
