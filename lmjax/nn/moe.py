"""Mixture of experts in place of the MLP: a router picks the few experts that compute each token.

Shape suffixes: B batch, T sequence, N = B * T tokens, k experts per token, M = N * k choices,
E experts, C slots per expert and row, D embed_dim, F mlp_dim. A choice is one of a token's experts.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lmjax.nn.layers import ACTIVATIONS, MLP, MLP_KINDS, Dense, other_side
from lmjax.nn.module import Initializer, param, zeros
from lmjax.nn.ops import MATMUL
from lmjax.nn.packed import NOT_QUANTIZED, Packed, in_training, rounded_to
from lmjax.nn.quantized import matmuls_in
from lmjax.nn.routing import MoEConfig, Routing, choose_experts, routing_of
from lmjax.nn.sequence import mesh_axes
from lmjax.sharding import constrain, current_layout, platform

# Multiplies rows by their experts' matrices [E, in, out].
ExpertDot = Callable[[jax.Array, jax.Array], jax.Array]
INTO, OUT = ("experts", "expert_embed", "mlp"), ("experts", "mlp", "expert_embed")
BIAS_INTO, BIAS_OUT = ("experts", "mlp"), ("experts", "norm")


class ExpertMatrices(NamedTuple):
    """The matrices of all experts, [E, in, out], or their biases, [E, out]."""

    gate: Any  # None if the MLP is not gated
    up: Any
    down: Any

    def map(self, fn: Callable[[Any, Any], Any], args: tuple[Any, Any, Any]) -> "ExpertMatrices":
        """fn(matrix, argument) for each matrix that there is."""
        return ExpertMatrices(*(m if m is None else fn(m, arg)
                                for m, arg in zip(self, args, strict=True)))


class ExpertRows(NamedTuple):
    """How rows meet what their experts have."""

    dot: ExpertDot  # multiplies rows by their experts' matrices
    of: Callable[[jax.Array], jax.Array]  # biases [E, out] -> what is added to the rows


class MoE(nnx.Module):
    """Router, experts and, optionally, an expert for all tokens.

    Parameters are named as in `MLP`, with a leading dimension of experts. With a capacity, padding
    takes no slots.
    """

    def __init__(self, dim: int, hidden: int, config: MoEConfig, *, kind: str, init: Initializer,
                 out_init: Initializer, rngs: nnx.Rngs):
        c = self.config = config
        self.activation, gated = MLP_KINDS[kind]
        hidden = c.mlp_dim or hidden
        into, out = (c.experts, dim, hidden), (c.experts, hidden, dim)
        self.router = Dense((dim,), (c.experts,), ("embed", "router"), use_bias=c.bias, init=init,
                            rngs=rngs)
        self.correction = param(rngs, zeros, (c.experts,), ("norm",)) if c.correction else None
        self.gate = Experts(into, INTO, init, rngs, c.bias) if gated else None
        self.up = Experts(into, INTO, init, rngs, c.bias)
        self.down = Experts(out, OUT, out_init, rngs, c.bias)
        self.shared = MLP(dim, c.shared_dim, kind=kind, use_bias=False, init=init,
                          out_init=out_init, rngs=rngs) if c.shared_dim else None
        self.shared_gate = (Dense((dim,), (1,), ("embed", None), use_bias=False, init=init,
                                  rngs=rngs) if c.shared_dim and c.shared_gate else None)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array) -> tuple[jax.Array, Routing]:
        """Runs every token through its experts.

        Args:
          real_BT: bool, False on padding.

        Returns:
          [B, T, D], and the router's statistics.
        """
        with matmuls_in("auto"), rounded_to(NOT_QUANTIZED):
            logits_BTE = self.router(x_BTD).astype(jnp.float32)
        bias_E = None if self.correction is None else self.correction[...]
        probs_BTE, weights_BTk, experts_BTk = choose_experts(self.config, logits_BTE, bias_E)
        kept = None
        if self.config.capacity:
            y_BTD, kept = self._within_capacity(x_BTD, weights_BTk, experts_BTk, real_BT)
        else:
            y_BTD = self._dropless(x_BTD, weights_BTk, experts_BTk)
        if self.shared is not None:
            y = self.shared(x_BTD)
            if self.shared_gate is not None:
                with rounded_to(NOT_QUANTIZED):
                    y = jax.nn.sigmoid(self.shared_gate(x_BTD)) * y
            y_BTD += y
        return y_BTD, routing_of(logits_BTE, probs_BTE, experts_BTk, real_BT, kept)

    def _dropless(self, x_BTD: jax.Array, weights_BTk: jax.Array,
                  experts_BTk: jax.Array) -> jax.Array:
        """Computes all choices: each device those of its own experts, for all rows of its group."""
        layout, matrices = current_layout(), self._matrices(x_BTD.dtype)
        biases = self._biases(x_BTD.dtype)
        if layout is None or layout.mesh.size == 1:
            return self._sorted(x_BTD, weights_BTk, experts_BTk, matrices, biases)
        arrays = x_BTD, weights_BTk, experts_BTk
        rows = [layout.spec(("batch", "seq", None), a.shape) for a in arrays]
        sides = matrices.map(lambda m, axes: layout.spec(axes, m.shape), (INTO, INTO, OUT))
        of_biases = None if biases is None else biases.map(
            lambda b, axes: layout.spec(axes, b.shape), (BIAS_INTO, BIAS_INTO, BIAS_OUT))
        # Where devices have the same rows, as in generation, they gather the same matrices. JAX
        # cannot verify that their results are equal.
        same_rows = {*mesh_axes("expert_embed")} - {*mesh_axes("batch"), *mesh_axes("seq")}
        run = jax.shard_map(self._sorted, mesh=layout.mesh, in_specs=(*rows, sides, of_biases),
                            out_specs=rows[0], check_vma=not same_rows)
        return run(*arrays, matrices, biases)

    def _sorted(self, x_BTD: jax.Array, weights_BTk: jax.Array, experts_BTk: jax.Array,
                matrices: ExpertMatrices, biases: ExpertMatrices | None) -> jax.Array:
        """Sorts the choices by expert, and multiplies the rows of each expert by its matrices.

        On a mesh the arguments are one device's shares. Its matrices are gathered along
        `expert_embed`, and the rows along `experts`. The outputs are summed over the devices that
        shared the rows, and scattered to the devices that own them.
        """
        group, across = mesh_axes("experts"), mesh_axes("expert_embed")
        if across:
            matrices = matrices.map(
                lambda m, side: lax.all_gather(m, across, axis=side, tiled=True), (1, 1, 2))
        if group:
            x_BTD, weights_BTk, experts_BTk = (
                lax.all_gather(a, group, tiled=True) for a in (x_BTD, weights_BTk, experts_BTk))
        (B, T, k), E = experts_BTk.shape, matrices.up.shape[0]
        chosen_M = experts_BTk.reshape(-1) - (lax.axis_index(group) * E if group else 0)
        # Choices of other devices' experts are sorted last.
        chosen_M = jnp.where((chosen_M >= 0) & (chosen_M < E), chosen_M, E)
        order_M = jnp.argsort(chosen_M, stable=True)
        sizes_E = jnp.zeros((E,), jnp.int32).at[chosen_M].add(1, mode="drop")
        staged = bool(mesh_axes("layers"))
        rows = block_rows(B * T * k, E) if platform() == "cpu" and not staged else 0
        if rows:
            order_M, experts = sort_into_blocks(order_M, sizes_E, rows)
            own_M1 = (order_M < B * T * k)[:, None]
            dot = _blocks_dot(experts, rows)
        else:
            own_M1 = (jnp.arange(B * T * k) < jnp.sum(sizes_E))[:, None]
            dot = _grouped_dot(sizes_E, staged)
        x_MD = x_BTD.reshape(B * T, -1).at[order_M // k].get(mode="clip")
        x_MD = jnp.where(own_M1, x_MD, 0)
        weights_M = weights_BTk.reshape(-1).at[order_M].get(mode="clip")
        # A grouped matmul leaves rows after its last group undefined.
        rows_M = ExpertRows(dot, lambda b: _of_rows(b, chosen_M, order_M))
        halves = mesh_axes("mlp")
        if biases is not None and halves:  # whose outputs are summed: one of them adds the bias
            first = lax.axis_index(halves) == 0
            biases = biases._replace(down=jnp.where(first, biases.down, 0))
        y_MD = jnp.where(own_M1, self._apply(x_MD, matrices, biases, rows_M, weights_M), 0)
        y_NkD = jnp.zeros((B * T * k, y_MD.shape[-1]), y_MD.dtype).at[order_M].set(
            y_MD, mode="drop", unique_indices=True).reshape(B, T, k, -1)
        y_BTD = jnp.sum(y_NkD, axis=2)
        y_BTD = lax.psum_scatter(y_BTD, group, tiled=True) if group else y_BTD
        return lax.psum(y_BTD, halves) if halves else y_BTD

    def _within_capacity(self, x_BTD: jax.Array, weights_BTk: jax.Array, experts_BTk: jax.Array,
                         real_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Puts the choices into the experts' slots for each row, as long as there are slots.

        First choices take slots before second choices; within these, tokens go from left to right.

        Returns:
          [B, T, D], and the number of choices that got a slot.
        """
        c = self.config
        B, T, k = experts_BTk.shape
        C = min(math.ceil(c.capacity * k * T / c.experts), T)
        chosen_BkTE = jax.nn.one_hot(jnp.swapaxes(experts_BTk, 1, 2), c.experts)
        chosen_BkTE = chosen_BkTE * real_BT[:, None, :, None]
        before = jnp.cumsum(chosen_BkTE.reshape(B, k * T, -1), axis=1).reshape(chosen_BkTE.shape)
        before = before - chosen_BkTE
        slot_BkT = jnp.sum(before * chosen_BkTE, axis=-1).astype(jnp.int32)
        # For a slot of C or more, one_hot is all zeros: the choice is dropped.
        put_BkTEC = chosen_BkTE[..., None] * jax.nn.one_hot(slot_BkT, C)[..., None, :]
        into_BTEC = jnp.sum(put_BkTEC, axis=1).astype(x_BTD.dtype)
        back_BTEC = jnp.einsum("BkTEC,BTk->BTEC", put_BkTEC, weights_BTk).astype(x_BTD.dtype)
        # Where the experts are split over devices, the change between these two placements makes
        # the compiler exchange rows by all-to-all.
        with_rows = None, "batch", None, None
        with_experts = "act_experts", "expert_batch", None, None
        x_EBCD = constrain(jnp.einsum("BTEC,BTD->EBCD", into_BTEC, x_BTD), *with_rows)
        rows = ExpertRows(lambda x, w: jnp.einsum("EBCD,EDF->EBCF", x, w),
                          lambda b: b[:, None, None])
        y_EBCD = self._apply(constrain(x_EBCD, *with_experts), self._matrices(x_BTD.dtype),
                             self._biases(x_BTD.dtype), rows)
        y_EBCD = constrain(constrain(y_EBCD, *with_experts), *with_rows)
        return jnp.einsum("BTEC,EBCD->BTD", back_BTEC, y_EBCD), jnp.sum(put_BkTEC)

    def _matrices(self, dtype: Any) -> ExpertMatrices:
        gate = None if self.gate is None else self.gate.matrices(dtype)
        return ExpertMatrices(gate, self.up.matrices(dtype), self.down.matrices(dtype))

    def _biases(self, dtype: Any) -> ExpertMatrices | None:
        found = (None if side is None or side.bias is None else side.bias[...].astype(dtype)
                 for side in (self.gate, self.up, self.down))
        return ExpertMatrices(*found) if self.config.bias else None

    def _apply(self, x: jax.Array, matrices: ExpertMatrices, biases: ExpertMatrices | None,
               rows: ExpertRows, weights: jax.Array | None = None) -> jax.Array:
        """The experts' MLP on rows, each times its weight.

        The weight is applied before the last matmul. Applied afterwards, its gradient would need
        that matmul's result again.
        """
        (gate, up, down), act = matrices, ACTIVATIONS[self.activation]

        def first(w: jax.Array, name: str) -> jax.Array:
            y = checkpoint_name(rows.dot(x, w), MATMUL)
            y = y if biases is None else y + rows.of(getattr(biases, name))
            return checkpoint_name(y, name)

        hidden = act(first(up, "up") if gate is None else first(gate, "gate"))
        hidden = hidden if gate is None else hidden * other_side(self.activation, first(up, "up"))
        weighed = None if weights is None else weights[:, None].astype(hidden.dtype)
        y = rows.dot(hidden if weighed is None else hidden * weighed, down)
        if biases is None:
            return y
        bias = rows.of(biases.down)
        return y + (bias if weighed is None else bias * weighed)


def _of_rows(biases_EF: jax.Array, chosen_M: jax.Array, order_M: jax.Array) -> jax.Array:
    """The bias of each row's expert, 0 for a row of none.

    Args:
      chosen_M: the expert of each choice; E: none.
      order_M: the choice of each row; M or more: none.
    """
    E = biases_EF.shape[0]
    experts = chosen_M.at[order_M].get(mode="fill", fill_value=E)
    return biases_EF.at[experts].get(mode="fill", fill_value=0)


def block_rows(M: int, E: int) -> int:
    """Rows per block for `sort_into_blocks`; 0: there are too few rows for blocks.

    About half of an expert's even share: smaller blocks copy matrices more often, larger blocks pad
    more.
    """
    return min(2 ** int(math.log2(M / E / 2)), 256) if M >= 32 * E else 0


def sort_into_blocks(order_M: jax.Array, sizes_E: jax.Array,
                     rows: int) -> tuple[jax.Array, jax.Array]:
    """Cuts choices that are sorted by expert into blocks of `rows`, each of a single expert.

    A CPU multiplies one block after another. XLA's `ragged_dot` would there compute every expert
    for every row.

    Args:
      order_M: the choices, sorted by expert.
      sizes_E: the number of choices of each expert.

    Returns:
      The choices [blocks * rows], where M (no choice) fills up the last block of each expert; and
      the expert of each block [blocks].
    """
    M, E = order_M.shape[0], sizes_E.shape[0]
    blocks_E = (sizes_E + rows - 1) // rows
    end_E = jnp.cumsum(blocks_E)
    n = jnp.arange(M // rows + E)  # the greatest number of blocks that any sizes need
    expert = jnp.minimum(jnp.sum(n[:, None] >= end_E[None], axis=1), E - 1)
    row = (n - (end_E - blocks_E)[expert])[:, None] * rows + jnp.arange(rows)[None]
    at = (jnp.cumsum(sizes_E) - sizes_E)[expert][:, None] + row
    order = jnp.where(row < sizes_E[expert][:, None], order_M.at[at].get(mode="clip"), M)
    return order.reshape(-1), expert


def _blocks_dot(experts: jax.Array, rows: int) -> ExpertDot:
    """Multiplies blocks of `rows` by the matrix of each block's expert."""

    def dot(x: jax.Array, w: jax.Array) -> jax.Array:
        blocks = x.reshape(-1, rows, x.shape[-1]), experts
        return lax.map(lambda block: block[0] @ w[block[1]], blocks).reshape(-1, w.shape[-1])

    return dot


def _grouped_dot(sizes_E: jax.Array, staged: bool) -> ExpertDot:
    """Multiplies the rows of each expert, sizes_E of them, by its matrix."""
    dot = _staged_dot if staged else lax.ragged_dot
    return lambda x, w: dot(x, w, sizes_E)


class Experts(nnx.Module):
    """One matrix per expert, [E, in, out], and a bias [E, out] if there is one."""

    def __init__(self, shape: tuple[int, int, int], axes: tuple[str, ...], init: Initializer,
                 rngs: nnx.Rngs, bias: bool = False):
        self.kernel = param(rngs, init, shape, axes)
        bias_axes = BIAS_INTO if axes == INTO else BIAS_OUT
        self.bias = param(rngs, zeros, (shape[0], shape[2]), bias_axes) if bias else None

    def matrices(self, dtype: Any) -> jax.Array:
        """The matrices [E, in, out] in `dtype`; packed ones are unpacked for one use."""
        kernel = self.kernel[...]
        if isinstance(kernel, Packed):
            return jnp.swapaxes(kernel.dense(dtype), 1, 2)
        return in_training(kernel, 1, lead=1).astype(dtype)


@jax.custom_batching.custom_vmap
def _staged_dot(x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`lax.ragged_dot` for a pipeline, whose `vmap` over stages it has no rule for."""
    return lax.ragged_dot(x_MD, w_EDF, sizes_E)


@_staged_dot.def_vmap
def _each_stage(stages: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
    """Loops over the stages; on a mesh each device has only one."""
    assert all(batched), batched
    return lax.map(lambda of_stage: lax.ragged_dot(*of_stage), args), True
