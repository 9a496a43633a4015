"""Positions of tokens: rotary embedding and its scalings, sinusoids, T5's relative buckets.

Rotary position embedding (Su et al. 2021, arXiv:2104.09864) is half-split, as in Hugging Face's
Llama.

Shape suffixes: B batch, T query sequence, S key sequence, H heads, K head_dim, D embed_dim.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lmjax.config import at_least, choice
from lmjax.errors import UserError
from lmjax.sharding import platform

# cos and sin of the rotary angles, each float32 [B, T, rotary_dim / 2]
Rotation = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for rows longer than those the model was first trained on.

    Kinds: none; linear (Chen et al. 2023, arXiv:2306.15595); ntk, which raises theta; llama3
    (arXiv:2407.21783); yarn (Peng et al. 2023, arXiv:2309.00071).
    """

    kind: str = "none"
    factor: float = 1.0  # how many times longer the rows are
    original_positions: int = 0  # row length of the first training (ntk, llama3, yarn)
    # ntk: the row length at which this equals "dynamic" NTK, which uses each row's own length. 0:
    # theta is raised by `factor` alone.
    length: int = 0
    # llama3 scales wavelengths above original_positions / low_freq_factor, keeps those below
    # original_positions / high_freq_factor, and interpolates between.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn keeps frequencies of at least beta_fast turns over original_positions, scales those of at
    # most beta_slow turns, and interpolates between.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    # yarn multiplies cos and sin by it. 0: `temperature(1)`, or if mscale and mscale_all_dim are
    # set, temperature(mscale) / temperature(mscale_all_dim), as in DeepSeek-V2.
    attention_factor: float = 0.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0  # latent attention multiplies scores by its temperature squared
    truncate: bool = True  # yarn interpolates between whole dimensions (gpt-oss: between any)

    def __post_init__(self) -> None:
        choice("kind", self.kind, ROPE_SCALINGS)
        at_least(1, factor=self.factor)
        at_least(0, length=self.length, attention_factor=self.attention_factor,
                 mscale=self.mscale, mscale_all_dim=self.mscale_all_dim)
        if self.kind in ("llama3", "yarn") or self.length:
            at_least(1, original_positions=self.original_positions)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise UserError(f"more than low_freq_factor={self.low_freq_factor}",
                            self.high_freq_factor, "raise it", where="high_freq_factor")

    def temperature(self, mscale: float) -> float:
        """0.1 * mscale * ln(factor) + 1, by which yarn makes attention sharper on longer rows."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def size(self) -> float:
        """What yarn multiplies cos and sin by."""
        if self.attention_factor or not (self.mscale and self.mscale_all_dim):
            return self.attention_factor or self.temperature(1.0)
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by."""
        return self.temperature(self.mscale_all_dim) ** 2 if self.kind == "yarn" else 1.0


def _frequencies(head_dim: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _linear(s: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    return _frequencies(head_dim, theta) / s.factor


def _ntk(s: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    stretch = s.factor
    if s.length:
        length = max(s.length, s.original_positions)
        stretch = s.factor * length / s.original_positions - (s.factor - 1)
    return _frequencies(head_dim, theta * stretch ** (head_dim / (head_dim - 2)))


def _llama3(s: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    plain = _frequencies(head_dim, theta)
    turns = s.original_positions * plain / (2 * np.pi)
    kept = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    kept = np.clip(kept, 0, 1)
    return (1 - kept) * plain / s.factor + kept * plain


def _yarn(s: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
    plain = _frequencies(head_dim, theta)

    def dimension(turns: float) -> float:
        """The dimension whose frequency makes `turns` turns over original_positions."""
        wavelength = s.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    # The ends cross where beta_fast is below beta_slow, or few rows come before the scaling.
    scaled = np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    return scaled * plain / s.factor + (1 - scaled) * plain


# kind -> the frequencies, float64 [head_dim / 2], of a scaling, head_dim and theta
ROPE_SCALINGS: dict[str, Callable[[RopeScaling, int, float], np.ndarray]] = {
    "none": lambda s, head_dim, theta: _frequencies(head_dim, theta),
    "linear": _linear,
    "ntk": _ntk,
    "llama3": _llama3,
    "yarn": _yarn,
}
NO_SCALING = RopeScaling()


def rope_rotation(positions_BT: jax.Array, head_dim: int, theta: float,
                  scaling: RopeScaling = NO_SCALING) -> Rotation:
    """cos and sin of positions * theta^(-2i / head_dim), with the frequencies scaled."""
    scaled = jnp.asarray(ROPE_SCALINGS[scaling.kind](scaling, head_dim, theta), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[..., None] * scaled.reshape(1, 1, -1)
    if scaling.kind != "yarn":
        return jnp.cos(angles), jnp.sin(angles)
    return scaling.size * jnp.cos(angles), scaling.size * jnp.sin(angles)


def apply_rope(x_BTHK: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (x_i, x_{i + rotary_dim/2}) of every head, in float32.

    The dimensions after the first `rotary_dim`, twice as many as `rotation` has, stay as they are.
    """
    rotary_dim = 2 * rotation[0].shape[-1]
    if rotary_dim < x_BTHK.shape[-1]:
        turned, kept = jnp.split(x_BTHK, [rotary_dim], axis=-1)
        return jnp.concatenate([apply_rope(turned, rotation), kept], axis=-1)
    cos, sin = (r[:, :, None, :] for r in rotation)
    if platform() == "tpu":
        cos, sin = (jnp.concatenate([r, r], axis=-1) for r in (cos, sin))
        return _rope_by_matmul(x_BTHK, cos, sin)
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)


@jax.custom_vjp
def _rope_by_matmul(x_BTHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x * cos + (x rotated by 90 degrees) * sin, where a matmul rotates by 90 degrees.

    A TPU cannot cheaply swap the halves of a vector register. A matmul with a signed permutation
    swaps them without rounding, and is fused with the operations after it.
    """
    half = x_BTHK.shape[-1] // 2
    turn = np.roll(np.eye(2 * half), half, axis=1)
    turn[half:] *= -1
    exact = lax.Precision.HIGHEST if x_BTHK.dtype == jnp.float32 else None
    turned = lax.dot_general(
        x_BTHK, jnp.asarray(turn, x_BTHK.dtype), (((3,), (0,)), ((), ())), precision=exact,
        preferred_element_type=jnp.float32)
    return (x_BTHK.astype(jnp.float32) * cos + turned * sin).astype(x_BTHK.dtype)


_rope_by_matmul.defvjp(
    lambda x, cos, sin: (_rope_by_matmul(x, cos, sin), (cos, sin)),
    lambda saved, g: (_rope_by_matmul(g, saved[0], -saved[1]), None, None))


def _tensor2tensor(dim: int, theta: float) -> np.ndarray:
    """theta^(-i / (dim/2 - 1)): the last is 1 / theta itself."""
    return theta ** -(np.arange(dim // 2, dtype=np.float64) / (dim // 2 - 1))


# kind -> the frequencies, float64 [dim / 2], of a dimension and the longest wavelength / 2 pi
SINUSOIDS = {"sinusoidal": _frequencies, "sinusoidal_t2t": _tensor2tensor}


def sinusoids(positions_BT: jax.Array, dim: int, kind: str = "sinusoidal") -> jax.Array:
    """Position embeddings float32 [B, T, D]: sines in the first half, cosines in the second.

    Vaswani et al. 2017, arXiv:1706.03762, interleave the two; the dimensions are only permuted.

    kind: a row of `SINUSOIDS`.
    """
    frequencies = jnp.asarray(SINUSOIDS[kind](dim, 10_000.0), jnp.float32)
    angles = positions_BT.astype(jnp.float32)[..., None] * frequencies.reshape(1, 1, -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def relative_buckets(q_positions_BT: jax.Array, kv_positions_BS: jax.Array, *, bidirectional: bool,
                     buckets: int, distance: int) -> jax.Array:
    """T5's bucket of each pair of positions (Raffel et al. 2019, arXiv:1910.10683).

    Each of the nearest keys has a bucket of its own. Farther keys share buckets, which grow
    logarithmically up to `distance`.

    Args:
      bidirectional: uses half of the buckets for later keys.

    Returns:
      int32 [B, T, S] in [0, buckets).
    """
    offset = kv_positions_BS[:, None, :] - q_positions_BT[:, :, None]
    first = jnp.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        first = jnp.where(offset > 0, buckets, 0)
    away = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    exact = buckets // 2
    # The distances at which the logarithm reaches the next bucket, as integers: rounding must not
    # move a boundary.
    growth = distance / exact
    edges = [math.ceil(exact * growth ** (i / (buckets - exact)) - 1e-9)
             for i in range(1, buckets - exact)]
    far = exact + sum((away >= edge).astype(jnp.int32) for edge in edges)
    return first + jnp.where(away < exact, away, far)
