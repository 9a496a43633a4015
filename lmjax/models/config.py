"""The dimensions and switches that every architecture has."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lmjax.config import at_least, choice
from lmjax.errors import UserError
from lmjax.models.heads import HeadConfig
from lmjax.nn.attention import QK_NORMS
from lmjax.nn.latent_attention import LatentConfig
from lmjax.nn.layers import MLP_KINDS, NORMS
from lmjax.nn.positions import SINUSOIDS, RopeScaling
from lmjax.nn.routing import MoEConfig
from lmjax.nn.stack import remat_policy

CHOICES: dict[str, Sequence[str] | Mapping[str, Any]] = {
    "positions": ("rope", "learned", *SINUSOIDS, "relative", "none"),
    "norm": NORMS,
    "mlp": MLP_KINDS,
    "norm_position": ("pre", "post", "both", "after"),
    "parallel_residual": ("none", "one_norm", "own_norms"),
    "qk_norm_over": QK_NORMS,
    "qk_norm_kind": ("auto", *NORMS),
    "embedding_norm": ("none", "own", "first"),
    "parametrization": ("standard", "mup", "completep"),
}
# The kinds of layers: local ones have the window, and those of "nope" have no RoPE.
LAYER_KINDS = ("global", "local", "global_nope", "local_nope")
NOT_NEGATIVE = (
    "num_kv_heads", "head_dim", "vocab_size", "sliding_window", "attention_softcap",
    "logit_softcap", "dropout", "position_offset", "local_rope_theta", "query_scalar",
    "embedding_std", "norm_eps", "init_std", "qkv_clip", "base_embed_dim", "base_num_layers",
    "base_head_dim")


class Dims(NamedTuple):
    """The dimensions of the attention heads, none of them 0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The part of a model's config that is the same for every architecture."""

    num_layers: int = 12
    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 0  # 0: embed_dim / num_heads
    mlp_dim: int = 3072
    vocab_size: int = 0  # 0: the tokenizer's
    max_positions: int = 1024  # rows of the learned table
    position_offset: int = 0  # position p has row p + offset of it (RoBERTa), or that sinusoid
    # rope, learned, relative (the buckets of T5), none; sinusoidal; sinusoidal_t2t: with the
    # frequencies of tensor2tensor (M2M-100)
    positions: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    local_rope_theta: float = 0.0  # of local layers, without scaling; 0: like the global layers
    rotary_fraction: float = 1.0  # the part of each head, its first dimensions, that RoPE rotates
    relative_buckets: int = 32
    relative_distance: int = 128  # all larger distances share the last bucket
    # rmsnorm, rmsnorm_1p (Gemma: 1 + scale), layernorm, layernorm_no_bias, layernorm_plain (OLMo:
    # without parameters)
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    # pre: before a branch; post: after the sum; both: around a branch; after: of a branch's output
    norm_position: str = "pre"
    # none: the MLP reads the sum that attention added to. Else both read the same residual stream:
    # own_norms through a norm each (GPT-NeoX), one_norm through the same norm (GPT-J).
    parallel_residual: str = "none"
    # none; own: a norm of the embeddings; first: the first layer's attention norm also replaces
    # the residual stream by its output (ModernBERT)
    embedding_norm: str = "none"
    scale_embeddings: bool = False  # multiplies embeddings by sqrt(embed_dim)
    embedding_multiplier: float = 1.0  # multiplies embeddings (Granite)
    residual_multiplier: float = 1.0  # multiplies each branch before it is added (Granite)
    # gelu (exact), gelu_tanh, relu, silu; gated: swiglu, geglu (tanh), geglu_erf, reglu,
    # swiglu_clamped (gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), with both limited to 7)
    mlp: str = "swiglu"
    use_bias: bool = False  # in all matrices
    qkv_bias: bool = False  # in the projections to queries, keys and values
    out_bias: bool = False  # in the output projection of attention
    mlp_bias: bool = False  # in the matrices of the MLP
    qk_norm: bool = False  # norms queries and keys
    # head: each head, all with one scale; each_head: each with its own scale; all_heads: the
    # features of all heads together
    qk_norm_over: str = "head"
    qk_norm_kind: str = "auto"  # like `norm`; auto: `norm` if it is an RMSNorm, else rmsnorm
    qkv_clip: float = 0.0  # queries, keys and values are clipped to [-qkv_clip, qkv_clip]; 0: off
    query_scalar: float = 0.0  # scores are divided by its square root; 0: head_dim
    # In a local layer a token sees the last `sliding_window` tokens, itself included; in an encoder
    # the window reaches as far ahead. 0: no window.
    sliding_window: int = 0
    # The kinds of the layers in this order, repeated: "global" or "local", which has the window, or
    # either with "_nope", which has no RoPE. Empty: local if there is a window, else global.
    layer_pattern: tuple[str, ...] = ()
    # Each head has one learned logit that enters the softmax's denominator like one more key, but
    # has no value (gpt-oss).
    attention_sinks: bool = False
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: off
    logit_softcap: float = 0.0  # the same for logits
    tie_embeddings: bool = False  # the token table is also the unembedding
    latent: LatentConfig = dataclasses.field(default_factory=LatentConfig)  # latent attention
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)  # experts that replace the MLP
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)  # of a task; made by it
    dropout: float = 0.0  # of the embeddings and of each residual branch
    init_std: float = 0.02
    embedding_std: float = 0.0  # of the token table at the start; 0: init_std
    # standard; mup: rates, initial weights and multipliers follow width; completep: depth, too. See
    # `models.parametrization`. Of the base, whose settings hold for all sizes:
    parametrization: str = "standard"
    base_embed_dim: int = 0
    base_num_layers: int = 0  # of each stack of layers
    base_head_dim: int = 0  # 0: head_dim
    attention: str = "auto"  # the kernel's name, or auto
    scan_layers: bool = True  # compiles a loop over one layer; else every layer by itself
    # What is stored for the backward pass; the rest is recomputed. none: store all; full,
    # attention, dots, or names of what to store, such as kernel+out: see `nn.stack`.
    remat: str = "none"

    def __post_init__(self) -> None:
        for key, options in CHOICES.items():
            choice(key, getattr(self, key), options)
        remat_policy(self.remat)
        for kind in self.layer_pattern:
            choice("layer_pattern", kind, LAYER_KINDS)
        at_least(1, num_layers=self.num_layers, embed_dim=self.embed_dim, num_heads=self.num_heads,
                 mlp_dim=self.mlp_dim, max_positions=self.max_positions)
        at_least(4, relative_buckets=self.relative_buckets,
                 relative_distance=self.relative_distance)
        at_least(0, **{key: getattr(self, key) for key in NOT_NEGATIVE})
        at_least(1, rope_theta=self.rope_theta)
        if self.dropout >= 1:
            raise UserError("less than 1", self.dropout, "lower it", where="dropout")
        self._check_heads()
        self._check_layers()
        self._check_latent()
        for key, needed in (("base_embed_dim", self.parametrization != "standard"),
                            ("base_num_layers", self.parametrization == "completep")):
            if needed and not getattr(self, key):
                raise UserError(f"that of the base model for parametrization="
                                f"{self.parametrization}", 0, "set it", where=key)

    def _check_heads(self) -> None:
        """Refuses heads that do not divide what they share."""
        if not (self.head_dim or self.latent.kv_rank) and self.embed_dim % self.num_heads:
            raise UserError(f"a divisor of embed_dim={self.embed_dim}", self.num_heads,
                            "change one of them or set head_dim", where="num_heads")
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise UserError(f"a divisor of num_heads={self.num_heads}", self.num_kv_heads,
                            "change one of them", where="num_kv_heads")
        if self.positions == "rope" and self.dims.head_dim % 2:
            raise UserError("an even number for rope", self.dims.head_dim, "change it",
                            where="head_dim")
        if self.positions == "rope" and (not 0 < self.rotary_fraction <= 1 or self.rotary_dim % 2
                                         or not self.rotary_dim):
            raise UserError("a part of head_dim with an even number of dimensions, at least 2",
                            f"{self.rotary_fraction} of {self.dims.head_dim}", "change it",
                            where="rotary_fraction")

    def _check_layers(self) -> None:
        """Refuses switches that no layer can combine."""
        for key in ("use_bias", "mlp_bias"):
            if self.moe.experts and getattr(self, key):
                raise UserError("false with moe.experts", "true", "switch one of them off",
                                where=key)
        has_local = any(is_local(kind) for kind in self.layer_pattern)
        if has_local and not self.sliding_window:
            raise UserError("at least 1 for the local layers of layer_pattern", 0, "set it",
                            where="sliding_window")
        if self.sliding_window and self.layer_pattern and not has_local:
            raise UserError(f"a local layer for sliding_window={self.sliding_window}", "none",
                            "add one or set sliding_window=0", where="layer_pattern")
        if self.embedding_norm == "first" and (self.norm_position in ("post", "after")
                                               or self.parallel_residual != "none"):
            raise UserError("none or own, since the first norm is not before attention alone",
                            "first", "change one", where="embedding_norm")
        if self.parallel_residual != "none" and self.norm_position != "pre":
            raise UserError(f"none with norm_position={self.norm_position}",
                            self.parallel_residual, "change one", where="parallel_residual")

    def _check_latent(self) -> None:
        """Refuses what latent attention, or first layers without experts, are not combined with."""
        one_kind = len(set(self.layer_pattern)) <= 1
        in_halves = getattr(self, "family", "") == "encdec"
        refused = {
            "latent.kv_rank": self.latent.kv_rank and {
                "family": not in_halves,
                "positions": self.positions == "rope", "qk_norm": not self.qk_norm,
                "attention_sinks": not self.attention_sinks, "qkv_clip": not self.qkv_clip,
                "rotary_fraction": self.rotary_fraction == 1,
                "sliding_window": not self.sliding_window, "use_bias": not self.use_bias,
                "layer_pattern": {*self.layer_pattern} <= {"global"},
                "head_dim": self.head_dim in (0, self.latent.key_dim),
                "num_kv_heads": self.num_kv_heads in (0, self.num_heads),
                "parametrization": self.parametrization == "standard"},
            "moe.correction_rate": self.moe.correction_rate and {
                "family": not in_halves,
                "shared_layers": not getattr(self, "shared_layers", False)},
            "moe.first_dense": self.first_dense and {
                "family": not in_halves,
                "shared_layers": not getattr(self, "shared_layers", False),
                "layer_pattern": one_kind, "embedding_norm": self.embedding_norm != "first",
                "parametrization": self.parametrization == "standard"}}
        for key, conditions in refused.items():
            for name, holds in (conditions or {}).items():
                if not holds:
                    raise UserError(f"{name} at its default with {key}", getattr(self, name),
                                    "change one of them", where=name)
        if self.first_dense and self.first_dense >= self.num_layers:
            raise UserError(f"fewer than num_layers={self.num_layers}", self.first_dense,
                            "lower it", where="moe.first_dense")

    @property
    def first_dense(self) -> int:
        """How many layers come before the first with experts; 0 in a model without any."""
        return self.moe.first_dense if self.moe.experts else 0

    @property
    def output_softcap(self) -> float:
        """The soft-cap of the logits; a task's head has none."""
        return 0.0 if self.head.outputs else self.logit_softcap

    @property
    def dims(self) -> Dims:
        """The dimensions of the heads, with 0 replaced by what it stands for."""
        if self.latent.kv_rank:
            return Dims(self.num_heads, self.num_heads, self.latent.key_dim)
        return Dims(self.num_heads, self.num_kv_heads or self.num_heads,
                    self.head_dim or self.embed_dim // self.num_heads)

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head that RoPE rotates."""
        if self.latent.kv_rank:
            return self.latent.rope_dim
        # A fraction such as 30/44 may come out just below the number that it stands for.
        return int(self.dims.head_dim * self.rotary_fraction + 1e-6)

    def kinds(self, num_layers: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The kinds of layers among the first `num_layers`, and the kind of each layer.

        Returns:
          (kinds, pattern): those of `LAYER_KINDS` of which there are layers, in the order of their
          first layer; layer i is of kind kinds[pattern[i % len(pattern)]].
        """
        pattern = self.layer_pattern[:num_layers]
        if not pattern:
            pattern = ("local",) if self.sliding_window else ("global",)
        kinds = tuple(dict.fromkeys(pattern))
        return kinds, tuple(map(kinds.index, pattern))

    def window(self, kind: str) -> int:
        """The attention window of layers of this kind, in tokens; 0: none."""
        return self.sliding_window if is_local(kind) else 0


def is_local(kind: str) -> bool:
    """Whether layers of this kind have the window."""
    return kind.startswith("local")


def is_rotated(kind: str) -> bool:
    """Whether layers of this kind have RoPE, if the model has it."""
    return not kind.endswith("nope")
