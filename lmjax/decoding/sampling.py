"""From logits to the next token.

Shape suffixes: B batch, V vocab_size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lmjax.config import at_least


class Sampling(NamedTuple):
    """Traced, so that changing a setting compiles nothing.

    temperature: 0 is greedy. top_k: 0 is all. top_p: the smallest set of tokens with this probability (Holtzman et al.
    2020, arXiv:1904.09751). min_p: tokens at least this share as likely as the likeliest (Nguyen et al. 2024,
    arXiv:2407.01082). repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt and
    the answer so far (Keskar et al. 2019, arXiv:1909.05858).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises a ValueError that names the first setting that is out of its range."""
        at_least(0, temperature=self.temperature, top_k=self.top_k)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: expected a probability in (0, 1], got {self.top_p}; 1 switches it off")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: expected a share in [0, 1), got {self.min_p}; 0 switches it off")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: expected more than 0, got {self.repetition_penalty}; 1 switches it "
                             "off")


PLAIN = Sampling()


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """The logits with those of tokens that were seen (bool) made less likely, for a penalty above 1."""
    changed = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, changed, logits_BV)


def adjust(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is drawn from: softmax(logits / temperature) cut to top_k, top_p and min_p.

    What is cut is -inf; at temperature 0 that is all but the likeliest.
    """
    scaled = logits_BV / jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    # Sorting a vocabulary costs as much as a small model's step, so only those who ask for it pay.
    cuts = (sampling.temperature > 0) & ((sampling.top_k > 0) | (sampling.top_p < 1))
    lowest = jax.lax.cond(cuts, lambda: _lowest(scaled, sampling),
                          lambda: jnp.full_like(scaled[:, :1], -jnp.inf))
    best = jnp.max(scaled, axis=-1, keepdims=True)
    lowest = jnp.maximum(lowest, best + jnp.log(sampling.min_p))
    greedy = jnp.arange(scaled.shape[-1]).reshape(1, -1) == jnp.argmax(logits_BV, axis=-1, keepdims=True)
    kept = jnp.where(sampling.temperature > 0, scaled >= lowest, greedy)
    return jnp.where(kept, scaled, -jnp.inf)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token id a row, int32 [B], drawn from `adjust(logits)`."""
    # A random number for each token of the vocabulary costs more than all that a greedy step does here.
    drawn = jax.lax.cond(sampling.temperature > 0,
                         lambda: jax.vmap(jax.random.categorical)(keys_B, adjust(logits_BV, sampling)),
                         lambda: jnp.argmax(logits_BV, axis=-1))
    return drawn.astype(jnp.int32)


def _lowest(scaled_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """The smallest logit [B, 1] that top_k and top_p leave."""
    V = scaled_BV.shape[-1]
    ranked = -jnp.sort(-scaled_BV, axis=-1)
    top_k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, V), V)
    kept = jnp.arange(V).reshape(1, V) < top_k
    probability = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
    # A token stays while those ranked above it have less than top_p together, so one always stays.
    top_p = jnp.where(sampling.top_p < 1, sampling.top_p, jnp.inf)  # rounded sums may pass 1 before the last token
    kept &= jnp.cumsum(probability, axis=-1) - probability < top_p
    return jnp.min(jnp.where(kept, ranked, jnp.inf), axis=-1, keepdims=True)
