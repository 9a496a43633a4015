"""From logits to the next token.

Shape suffixes: B batch, V vocab_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.config import at_least
from lmjax.errors import UserError


class Sampling(NamedTuple):
    """How a token is drawn. All fields are traced: another value compiles nothing.

    A field is one value for all rows, or an array [B, 1] with one value per row.
    """

    temperature: float = 1.0  # 0: always the likeliest token
    top_k: int = 0  # only the k likeliest tokens; 0: all
    # Only the smallest set of likeliest tokens with this probability (Holtzman et al. 2020,
    # arXiv:1904.09751).
    top_p: float = 1.0
    # Only tokens at least this many times as likely as the likeliest (Nguyen et al. 2024,
    # arXiv:2407.01082).
    min_p: float = 0.0
    # Divides the positive and multiplies the negative logits of tokens in the prompt and in the
    # answer so far (Keskar et al. 2019, arXiv:1909.05858).
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises a `UserError` that names the first setting out of its range."""
        at_least(0, temperature=self.temperature, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise UserError("a probability in (0, 1]", self.top_p, "1 switches it off",
                            where="top_p")
        if not 0 <= self.min_p < 1:
            raise UserError("a share in [0, 1)", self.min_p, "0 switches it off", where="min_p")
        if not self.repetition_penalty > 0:
            raise UserError("more than 0", self.repetition_penalty, "1 switches it off",
                            where="repetition_penalty")


PLAIN = Sampling()


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """The logits after the repetition penalty. seen: bool, the tokens that occurred before."""
    changed = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, changed, logits_BV)


def adjust(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The logits of the distribution that tokens are drawn from.

    That is softmax(logits / temperature), cut by top_k, top_p and min_p: the logits of tokens that
    are cut are -inf. At temperature 0 only the likeliest token is left.
    """
    scaled = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    # Sorting the vocabulary takes as long as a step of a small model: only where it is needed.
    cuts = (sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))
    lowest = jax.lax.cond(jnp.any(cuts), lambda: _lowest(scaled, sampling),
                          lambda: jnp.full_like(scaled[:, :1], -jnp.inf))
    best = jnp.max(scaled, axis=-1, keepdims=True)
    lowest = jnp.maximum(lowest, best + jnp.log(sampling.min_p))
    likeliest = jnp.argmax(logits_BV, axis=-1, keepdims=True)
    greedy = jnp.arange(scaled.shape[-1]).reshape(1, -1) == likeliest
    kept = jnp.where(sampling.temperature > 0, scaled >= lowest, greedy)
    return jnp.where(kept, scaled, -jnp.inf)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token id per row, int32 [B], from `adjust(logits)`."""
    # Greedy decoding skips the draw: a random number per token of the vocabulary would be most of
    # the work here.
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature > 0),
        lambda: jax.vmap(jax.random.categorical)(keys_B, adjust(logits_BV, sampling)),
        lambda: jnp.argmax(logits_BV, axis=-1))
    return drawn.astype(jnp.int32)


def _lowest(scaled_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The smallest logit, [B, 1], that top_k and top_p keep."""
    V = scaled_BV.shape[-1]
    ranked = -jnp.sort(-scaled_BV, axis=-1)
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kept = jnp.arange(V).reshape(1, V) < top_k
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    # A token stays while all likelier tokens together have less than top_p: one always stays.
    # Without top_p the bound is infinite, as rounded sums may pass 1 before the last token.
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)
    kept &= jnp.cumsum(probability, axis=-1) - probability < top_p
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
