"""Mixture of experts in the place of the MLP: each token is computed by the few experts that a router picks for it.

Shape suffixes: B batch, T sequence, N = B * T tokens, M = N * k choices, k experts a token, E experts, C slots an
expert and row, D embed_dim, F mlp_dim.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.config import at_least
from lmjax.nn.layers import ACTIVATIONS, MLP, MLP_KINDS, Dense
from lmjax.nn.module import Initializer, param
from lmjax.nn.ops import MATMUL
from lmjax.nn.quantized import matmuls_in
from lmjax.nn.sequence import mesh_axes
from lmjax.sharding import constrain, current_layout, platform

Dot = Callable[[jax.Array, jax.Array], jax.Array]  # rows and the experts' matrices [E, in, out] -> rows
Kernels = tuple[jax.Array | None, jax.Array, jax.Array]  # gate, up, down
INTO, OUT = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """experts: how many there are; 0 makes the layers dense. per_token: how many compute a token. mlp_dim: of each; 0
    takes the model's. normalize: whether a token's weights sum to 1 (Mixtral) or are what the softmax over all experts
    gave them. shared_dim: mlp_dim of an expert for all tokens; 0: none. shared_gate: whether a sigmoid scales it
    (Qwen2-MoE). capacity: 0 drops no token; else an expert takes at most this multiple of an even share of a row's
    tokens (Lepikhin et al. 2020, arXiv:2006.16668) and those that are left get nothing from it. balance_loss, z_loss:
    coefficients of the load-balance loss (Fedus et al. 2021, arXiv:2101.03961) and of the router's z-loss (Zoph et al.
    2022, arXiv:2202.08906)."""

    experts: int = 0
    per_token: int = 2
    mlp_dim: int = 0
    normalize: bool = True
    shared_dim: int = 0
    shared_gate: bool = False
    capacity: float = 0.0
    balance_loss: float = 0.01
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        at_least(1, per_token=self.per_token)
        at_least(0, experts=self.experts, mlp_dim=self.mlp_dim, shared_dim=self.shared_dim, capacity=self.capacity,
                 balance_loss=self.balance_loss, z_loss=self.z_loss)
        if self.experts and self.per_token > self.experts:
            raise ValueError(f"per_token: expected at most experts={self.experts}, got {self.per_token}; lower it")


class Routing(NamedTuple):
    """What one layer's router did, over the tokens that are not padding.

    balance: E * sum over experts of (choices a token that fell on it) * (its mean probability); per_token when even. z:
    mean squared log of the softmax's denominator. counts: choices of each expert, float32 [E]. dropped: share of them
    that found no room. Padding is neither counted nor, with a capacity, computed."""

    balance: jax.Array
    z: jax.Array
    counts: jax.Array
    dropped: jax.Array


class MoE(nnx.Module):
    """Router, experts and, if wanted, an expert that all tokens share. Parameters as in `MLP`, one for each expert."""

    def __init__(self, dim: int, hidden: int, config: MoEConfig, *, kind: str, init: Initializer,
                 out_init: Initializer, rngs: nnx.Rngs):
        c = self.config = config
        self.activation, gated = MLP_KINDS[kind]
        hidden = c.mlp_dim or hidden
        into, out = (c.experts, dim, hidden), (c.experts, hidden, dim)
        self.router = Dense((dim,), (c.experts,), ("embed", "router"), use_bias=False, init=init, rngs=rngs)
        self.gate = Experts(into, INTO, init, rngs) if gated else None
        self.up = Experts(into, INTO, init, rngs)
        self.down = Experts(out, OUT, out_init, rngs)
        self.shared = MLP(dim, c.shared_dim, kind=kind, use_bias=False, init=init, out_init=out_init,
                          rngs=rngs) if c.shared_dim else None
        self.shared_gate = (Dense((dim,), (1,), ("embed", None), use_bias=False, init=init, rngs=rngs)
                            if c.shared_dim and c.shared_gate else None)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, Routing]:
        """x [B, T, D] and which tokens are not padding, bool [B, T] -> what the experts made of x, and how."""
        with matmuls_in("auto"):
            logits_BTE = self.router(x_BTD).astype(jnp.float32)
        probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        weights_BTk, experts_BTk = lax.top_k(probs_BTE, self.config.per_token)
        if self.config.normalize:
            weights_BTk = weights_BTk / jnp.sum(weights_BTk, axis=-1, keepdims=True)
        run = self._within_capacity if self.config.capacity else self._dropless
        y_BTD, kept = run(x_BTD, weights_BTk, experts_BTk, real_BT)
        if self.shared is not None:
            y = self.shared(x_BTD)
            y_BTD += y if self.shared_gate is None else jax.nn.sigmoid(self.shared_gate(x_BTD)) * y
        return y_BTD, _routing(logits_BTE, probs_BTE, experts_BTk, real_BT, kept)

    def _dropless(self, x_BTD: jax.Array, weights_BTk: jax.Array, experts_BTk: jax.Array,
                  real_BT: jax.Array) -> tuple[jax.Array, None]:
        """Each device sorts the choices of its own rows and of those of the devices that it shares the experts with."""
        arrays = x_BTD, weights_BTk, experts_BTk
        layout, kernels = current_layout(), self._kernels(x_BTD.dtype)
        if layout is None or layout.mesh.size == 1:
            return self._sorted(*arrays, kernels), None
        rows = [layout.spec(("batch", "seq", None), a.shape) for a in arrays]
        sides = [k if k is None else layout.spec(axes, k.shape)
                 for k, axes in zip(kernels, (INTO, INTO, OUT), strict=True)]
        # Devices with the same rows gather the same matrices, as where a model generates; that cannot be checked.
        same = {*mesh_axes("expert_embed")} - {*mesh_axes("batch"), *mesh_axes("seq")}
        run = jax.shard_map(self._sorted, mesh=layout.mesh, in_specs=(*rows, tuple(sides)), out_specs=rows[0],
                            check_vma=not same)
        return run(*arrays, kernels), None

    def _sorted(self, x_BTD: jax.Array, weights_BTk: jax.Array, experts_BTk: jax.Array, kernels: Kernels) -> jax.Array:
        """Choices sorted by expert, then one matmul with as many rows for each expert as chose it.

        On a mesh the arguments are a device's own: its matrices are made whole along `expert_embed`, and what its
        experts make of all rows of their group goes back, summed, to where the rows came from.
        """
        group, halves, across = mesh_axes("experts"), mesh_axes("mlp"), mesh_axes("expert_embed")
        if across:
            kernels = tuple(k if k is None else lax.all_gather(k, across, axis=side, tiled=True)
                            for k, side in zip(kernels, (1, 1, 2), strict=True))
        if group:
            x_BTD, weights_BTk, experts_BTk = (lax.all_gather(a, group, tiled=True)
                                               for a in (x_BTD, weights_BTk, experts_BTk))
        (B, T, k), E = experts_BTk.shape, kernels[1].shape[0]
        chosen_M = experts_BTk.reshape(-1) - (lax.axis_index(group) * E if group else 0)
        chosen_M = jnp.where((chosen_M >= 0) & (chosen_M < E), chosen_M, E)  # those of other devices' experts go last
        order_M = jnp.argsort(chosen_M, stable=True)
        sizes_E = jnp.zeros((E,), jnp.int32).at[chosen_M].add(1, mode="drop")
        staged = bool(mesh_axes("layers"))
        rows = block_rows(B * T * k, E) if platform() == "cpu" and not staged else 0
        if rows:
            order_M, experts = _in_blocks(order_M, sizes_E, rows)
            own_M1 = (order_M < B * T * k)[:, None]

            def dot(x: jax.Array, w: jax.Array) -> jax.Array:
                blocks = x.reshape(-1, rows, x.shape[-1]), experts
                return lax.map(lambda block: block[0] @ w[block[1]], blocks).reshape(-1, w.shape[-1])
        else:
            own_M1 = (jnp.arange(B * T * k) < jnp.sum(sizes_E))[:, None]
            grouped = _staged_dot if staged else lax.ragged_dot

            def dot(x: jax.Array, w: jax.Array) -> jax.Array:
                return grouped(x, w, sizes_E)

        x_MD = jnp.where(own_M1, x_BTD.reshape(B * T, -1).at[order_M // k].get(mode="clip"), 0)
        weights_M = weights_BTk.reshape(-1).at[order_M].get(mode="clip")
        # Rows beyond the last group: what a grouped matmul makes of them is left open.
        y_MD = jnp.where(own_M1, self._apply(x_MD, kernels, dot, weights_M), 0)
        y_NkD = jnp.zeros((B * T * k, y_MD.shape[-1]), y_MD.dtype).at[order_M].set(
            y_MD, mode="drop", unique_indices=True).reshape(B, T, k, -1)
        y_BTD = jnp.sum(y_NkD, axis=2)
        y_BTD = lax.psum_scatter(y_BTD, group, tiled=True) if group else y_BTD
        return lax.psum(y_BTD, halves) if halves else y_BTD

    def _within_capacity(self, x_BTD: jax.Array, weights_BTk: jax.Array, experts_BTk: jax.Array,
                         real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Choices put into each row's slots of an expert: first choices first, then from left to right."""
        c = self.config
        B, T, k = experts_BTk.shape
        C = min(math.ceil(c.capacity * k * T / c.experts), T)
        chosen_BkTE = jax.nn.one_hot(jnp.swapaxes(experts_BTk, 1, 2), c.experts) * real_BT[:, None, :, None]
        before = jnp.cumsum(chosen_BkTE.reshape(B, k * T, -1), axis=1).reshape(chosen_BkTE.shape) - chosen_BkTE
        slot_BkT = jnp.sum(before * chosen_BkTE, axis=-1).astype(jnp.int32)  # beyond C, one_hot gives no slot
        put_BkTEC = chosen_BkTE[..., None] * jax.nn.one_hot(slot_BkT, C)[..., None, :]
        into_BTEC = jnp.sum(put_BkTEC, axis=1).astype(x_BTD.dtype)
        back_BTEC = jnp.einsum("BkTEC,BTk->BTEC", put_BkTEC, weights_BTk).astype(x_BTD.dtype)
        # Where the experts are split, the two placements make the compiler exchange rows by all-to-all.
        with_rows, with_experts = (None, "batch", None, None), ("act_experts", "expert_batch", None, None)
        x_EBCD = constrain(jnp.einsum("BTEC,BTD->EBCD", into_BTEC, x_BTD), *with_rows)
        y_EBCD = self._apply(constrain(x_EBCD, *with_experts), self._kernels(x_BTD.dtype),
                             lambda x, w: jnp.einsum("EBCD,EDF->EBCF", x, w))
        y_EBCD = constrain(constrain(y_EBCD, *with_experts), *with_rows)
        return jnp.einsum("BTEC,EBCD->BTD", back_BTEC, y_EBCD), jnp.sum(put_BkTEC)

    def _kernels(self, dtype: Any) -> Kernels:
        return tuple(None if e is None else e.kernel[...].astype(dtype) for e in (self.gate, self.up, self.down))

    def _apply(self, x: jax.Array, kernels: Kernels, dot: Dot, weights: jax.Array | None = None) -> jax.Array:
        """The experts' MLP on rows that are already with them, each times its weight.

        The weight goes on before the last matmul: behind it, its gradient would need that matmul's result again.
        """
        (gate, up, down), act = kernels, ACTIVATIONS[self.activation]

        def first(w: jax.Array, name: str) -> jax.Array:
            return checkpoint_name(checkpoint_name(dot(x, w), MATMUL), name)

        hidden = act(first(up, "up")) if gate is None else act(first(gate, "gate")) * first(up, "up")
        return dot(hidden if weights is None else hidden * weights[:, None].astype(hidden.dtype), down)


def block_rows(M: int, E: int) -> int:
    """Rows of a block for `_in_blocks`, about half an even share: smaller ones copy matrices more often, larger ones
    pad more. 0: too few rows for blocks."""
    return min(2 ** int(math.log2(M / E / 2)), 256) if M >= 32 * E else 0


def _in_blocks(order_M: jax.Array, sizes_E: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Choices sorted by expert -> the same in blocks of `rows`, each of one expert, and the expert of each block.

    The last block of an expert is filled up with M, which is no choice. A CPU multiplies one block after the
    other; what XLA makes of `ragged_dot` there computes every expert for every row.
    """
    M, E = order_M.shape[0], sizes_E.shape[0]
    blocks_E = (sizes_E + rows - 1) // rows
    end_E, n = jnp.cumsum(blocks_E), jnp.arange(M // rows + E)  # at most so many blocks, whatever the sizes
    expert = jnp.minimum(jnp.sum(n[:, None] >= end_E[None], axis=1), E - 1)
    row = (n - (end_E - blocks_E)[expert])[:, None] * rows + jnp.arange(rows)[None]
    at = (jnp.cumsum(sizes_E) - sizes_E)[expert][:, None] + row
    order = jnp.where(row < sizes_E[expert][:, None], order_M.at[at].get(mode="clip"), M)
    return order.reshape(-1), expert


class Experts(nnx.Module):
    """A matrix for each expert, [E, in, out]."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, ...], init: Initializer, rngs: nnx.Rngs):
        self.kernel = param(rngs, init, shape, axes)


@jax.custom_batching.custom_vmap
def _staged_dot(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`lax.ragged_dot` inside a pipeline, for whose `vmap` over stages it has no rule."""
    return lax.ragged_dot(x_MD, w_EDF, sizes_E)


@_staged_dot.def_vmap
def _each_stage(stages: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
    """One stage after the other: a device has just one."""
    assert all(batched), batched
    return lax.map(lambda of_stage: lax.ragged_dot(*of_stage), args), True


def _routing(logits_BTE: jax.Array, probs_BTE: jax.Array, experts_BTk: jax.Array, real_BT: jax.Array,
             kept: jax.Array | None) -> Routing:
    E, real = logits_BTE.shape[-1], real_BT.astype(jnp.float32)
    tokens = jnp.maximum(jnp.sum(real), 1.0)
    counts = jnp.sum(jax.nn.one_hot(experts_BTk, E) * real[..., None, None], axis=(0, 1, 2))
    mean_E = jnp.sum(probs_BTE * real[..., None], axis=(0, 1)) / tokens
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1)) * real) / tokens
    dropped = jnp.zeros(()) if kept is None else 1 - kept / jnp.maximum(jnp.sum(counts), 1.0)
    return Routing(E * jnp.sum(counts / tokens * mean_E), z, counts, dropped)
