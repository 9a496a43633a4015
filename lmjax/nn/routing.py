"""How tokens choose their experts: the router's scores, groups of experts, weights, statistics.

Shape suffixes: B batch, T sequence, k experts per token, E experts.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lmjax.config import at_least, choice
from lmjax.errors import UserError

TINY = 1e-20  # keeps sums of sigmoids above 0


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Experts, how tokens choose among them, and the router's losses."""

    experts: int = 0  # number of experts; 0: layers are dense
    per_token: int = 2  # experts that compute a token
    mlp_dim: int = 0  # of each expert; 0: the model's
    # Whether a token's weights are scaled to sum to 1 (Mixtral), or are the probabilities that the
    # softmax over all experts gave.
    normalize: bool = True
    bias: bool = False  # of the router and of the experts' matrices (gpt-oss)
    # What the router's logits become: softmax, over all experts, or sigmoid, of each (DeepSeek-V3,
    # arXiv:2412.19437).
    scores: str = "softmax"
    # A token's experts are among the best `top_groups` of `groups` groups of experts (DeepSeek-V2,
    # arXiv:2405.04434). A group is as good as its best score, or with sigmoid as the sum of its
    # best two. 0: no groups.
    groups: int = 0
    top_groups: int = 0
    # Whether a bias per expert is added to the scores by which experts are chosen, not to their
    # weights (Wang et al. 2024, arXiv:2408.15664). No gradient reaches it.
    correction: bool = False
    # What each step adds to the bias of an expert with less than an even share of the choices, and
    # takes from that of one with more (ibid.; 0.001 in DeepSeek-V3). 0: the bias stays as it is.
    correction_rate: float = 0.0
    scale: float = 1.0  # multiplies the weights of a token's experts
    first_dense: int = 0  # layers before the first one with experts, which have the model's MLP
    shared_dim: int = 0  # mlp_dim of one more expert, which computes all tokens; 0: none
    shared_gate: bool = False  # whether a sigmoid scales that expert's output (Qwen2-MoE)
    # Limit of the tokens of a row per expert, as a multiple of an even share (Lepikhin et al. 2020,
    # arXiv:2006.16668). Tokens over the limit get no output from it. 0: no limit.
    capacity: float = 0.0
    # Coefficient of the load-balance loss (Fedus et al. 2021, arXiv:2101.03961).
    balance_loss: float = 0.01
    z_loss: float = 0.0  # coefficient of the router's z-loss (Zoph et al. 2022, arXiv:2202.08906)

    def __post_init__(self) -> None:
        at_least(1, per_token=self.per_token)
        at_least(0, experts=self.experts, mlp_dim=self.mlp_dim, shared_dim=self.shared_dim,
                 capacity=self.capacity, balance_loss=self.balance_loss, z_loss=self.z_loss)
        choice("scores", self.scores, ("softmax", "sigmoid"))
        at_least(0, groups=self.groups, top_groups=self.top_groups, first_dense=self.first_dense)
        if self.scale <= 0:
            raise UserError("more than 0", self.scale, "raise it", where="scale")
        self._check_groups()
        at_least(0, correction_rate=self.correction_rate)
        if self.correction_rate and not self.correction:
            raise UserError("0 without correction", self.correction_rate, "set correction=true",
                            where="correction_rate")
        if self.experts and self.per_token > self.experts:
            raise UserError(f"at most experts={self.experts}", self.per_token, "lower it",
                            where="per_token")

    def _check_groups(self) -> None:
        """Refuses groups that the experts do not divide into, or that have too few experts."""
        least = 2 if self.scores == "sigmoid" else 1
        if self.groups and (self.experts % self.groups or self.experts < least * self.groups):
            raise UserError(f"a divisor of experts={self.experts}, with {least} or more in a group",
                            self.groups, "change one of them", where="groups")
        if bool(self.groups) != bool(self.top_groups) or self.top_groups > self.groups:
            raise UserError(f"1 to groups={self.groups}, or 0 for both", self.top_groups,
                            "change one of them", where="top_groups")
        if self.groups and self.per_token * self.groups > self.top_groups * self.experts:
            most = self.top_groups * self.experts // self.groups
            raise UserError(f"at most the {most} experts of {self.top_groups} groups",
                            self.per_token, "lower it", where="per_token")


class Routing(NamedTuple):
    """Statistics of one layer's router, over the tokens that are not padding."""

    # E * sum over experts of (its choices per token) * (its mean probability); `per_token` if the
    # load is even.
    balance: jax.Array
    z: jax.Array  # mean square of the logarithm of the softmax's denominator
    counts: jax.Array  # choices of each expert, float32 [E]
    dropped: jax.Array  # share of the choices for which the expert had no slot


def choose_experts(config: MoEConfig, logits_BTE: jax.Array, correction_E: jax.Array | None,
                   ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Chooses the experts of each token.

    Args:
      correction_E: added to the scores by which experts are chosen; None: nothing is.

    Returns:
      (a distribution over the experts, for the balance loss; the weights [B, T, k] of a token's
      experts; the experts).
    """
    c = config
    if c.scores == "softmax":
        scores_BTE = probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    else:
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / (jnp.sum(scores_BTE, axis=-1, keepdims=True) + TINY)
    if correction_E is None and not c.groups:
        weights_BTk, experts_BTk = lax.top_k(scores_BTE, c.per_token)
    else:
        choice_BTE = scores_BTE
        if correction_E is not None:
            choice_BTE = choice_BTE + correction_E.reshape(1, 1, -1)
        _, experts_BTk = lax.top_k(_in_best_groups(c, choice_BTE), c.per_token)
        weights_BTk = jnp.take_along_axis(scores_BTE, experts_BTk, axis=-1)
    if c.normalize:
        total_BT1 = jnp.sum(weights_BTk, axis=-1, keepdims=True)
        weights_BTk = weights_BTk / (total_BT1 + TINY if c.scores == "sigmoid" else total_BT1)
    return probs_BTE, weights_BTk if c.scale == 1.0 else c.scale * weights_BTk, experts_BTk


def corrected(correction_LE: jax.Array, counts_LE: jax.Array, rate: float) -> jax.Array:
    """The biases of the experts of L layers after a step in which they had so many choices each.

    Wang et al. 2024, arXiv:2408.15664, algorithm 1.
    """
    even_L1 = jnp.mean(counts_LE, axis=-1, keepdims=True)
    return correction_LE + rate * jnp.sign(even_L1 - counts_LE)


def _in_best_groups(c: MoEConfig, choice_BTE: jax.Array) -> jax.Array:
    """The scores, -inf for the experts outside of each token's best groups."""
    if not c.groups:
        return choice_BTE
    grouped = choice_BTE.reshape(*choice_BTE.shape[:-1], c.groups, -1)
    best = jnp.sum(lax.top_k(grouped, 2 if c.scores == "sigmoid" else 1)[0], axis=-1)
    _, taken = lax.top_k(best, c.top_groups)
    is_taken = jnp.any(jax.nn.one_hot(taken, c.groups, dtype=bool), axis=-2)
    return jnp.where(is_taken[..., None], grouped, -jnp.inf).reshape(choice_BTE.shape)


def routing_of(logits_BTE: jax.Array, probs_BTE: jax.Array, experts_BTk: jax.Array,
             real_BT: jax.Array, kept: jax.Array | None) -> Routing:
    """The router's statistics; kept: the number of choices that got a slot, None for all."""
    E, real = logits_BTE.shape[-1], real_BT.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(real), 1.0)
    counts = jnp.sum(jax.nn.one_hot(experts_BTk, E) * real[..., None, None], axis=(0, 1, 2))
    mean_E = jnp.sum(probs_BTE * real[..., None], axis=(0, 1)) / tokens
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real) / tokens
    dropped = jnp.zeros(()) if kept is None else 1 - kept / jnp.maximum(jnp.sum(counts), 1.0)
    return Routing(E * jnp.sum(counts / tokens * mean_E), z, counts, dropped)
