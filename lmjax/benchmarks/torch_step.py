"""The train step of the same model in PyTorch, which `lmjax bench` compares itself with.

A decoder without special features is written here as PyTorch's users would write it. Any other
model is the class of `transformers`.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from lmjax.huggingface.settings import write_settings
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import ModelConfig

GELU = {"gelu": "none", "gelu_tanh": "tanh", "geglu": "tanh"}


class _Rotary:
    def __init__(self, seq_len: int, head_dim: int, theta: float, device: str):
        frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
        angles = torch.outer(torch.arange(seq_len, device=device).float(), frequencies)
        angles = torch.cat([angles, angles], -1)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return x * self.cos.to(x.dtype) + torch.cat([-b, a], -1) * self.sin.to(x.dtype)


def _norm(c: DecoderConfig) -> nn.Module:
    return (nn.RMSNorm if c.norm == "rmsnorm" else nn.LayerNorm)(c.embed_dim, eps=c.norm_eps)


class _Block(nn.Module):
    def __init__(self, c: DecoderConfig, rotary: _Rotary | None):
        super().__init__()
        self.c, self.rotary = c, rotary
        heads, kv_heads, head_dim = c.dims
        self.norm1, self.norm2 = _norm(c), _norm(c)
        self.qkv = nn.Linear(c.embed_dim, (heads + 2 * kv_heads) * head_dim, bias=c.use_bias)
        self.out = nn.Linear(heads * head_dim, c.embed_dim, bias=c.use_bias)
        self.q_norm = nn.RMSNorm(head_dim) if c.qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim) if c.qk_norm else None
        gated = c.mlp in ("swiglu", "geglu")
        self.up = nn.Linear(c.embed_dim, c.mlp_dim * (2 if gated else 1), bias=c.use_bias)
        self.down = nn.Linear(c.mlp_dim, c.embed_dim, bias=c.use_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (heads, kv_heads, head_dim), (B, T, _) = self.c.dims, x.shape
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        q, k, v = (t.view(B, T, -1, head_dim).transpose(1, 2)
                   for t in self.qkv(self.norm1(x)).split(sizes, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        return x + self.down(self._act(self.up(self.norm2(x))))

    def _act(self, h: torch.Tensor) -> torch.Tensor:
        if self.c.mlp in ("swiglu", "geglu"):
            gate, h = h.chunk(2, -1)
            swiglu = self.c.mlp == "swiglu"
            return h * (F.silu(gate) if swiglu else F.gelu(gate, approximate="tanh"))
        return F.relu(h) if self.c.mlp == "relu" else F.gelu(h, approximate=GELU[self.c.mlp])


class _Decoder(nn.Module):
    def __init__(self, c: DecoderConfig, seq_len: int, device: str):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.embed_dim)
        self.positions = nn.Embedding(seq_len, c.embed_dim) if c.positions == "learned" else None
        rotary = (_Rotary(seq_len, c.dims.head_dim, c.rope_theta, device)
                  if c.positions == "rope" else None)
        self.blocks = nn.ModuleList(_Block(c, rotary) for _ in range(c.num_layers))
        self.norm = _norm(c)
        self.head = nn.Linear(c.embed_dim, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.register_buffer("index", torch.arange(seq_len))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(self.index)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())


# The keys of a config that `_Decoder` follows; all other keys must have their defaults.
FOLLOWED = {
    "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "vocab_size",
    "max_positions", "positions", "rope_theta", "norm", "norm_eps", "mlp", "use_bias", "qk_norm",
    "tie_embeddings", "init_std", "embedding_std", "attention", "scan_layers", "remat"}
# Of some keys it follows only these values.
VALUES = {"positions": ("rope", "learned", "none"), "norm": ("rmsnorm", "layernorm"),
          "mlp": ("gelu", "gelu_tanh", "relu", "swiglu", "geglu")}


def lacking(config: ModelConfig) -> list[str]:
    """Returns the keys of a config that `_Decoder` does not follow; none: it is the same model."""
    defaults = DecoderConfig()

    def follows(key: str, value: object) -> bool:
        if key in FOLLOWED:
            return value in VALUES.get(key, (value,))
        return value == getattr(defaults, key, None)

    return [key for key, value in vars(config).items() if not follows(key, value)]


class _Library(nn.Module):
    """The class of `transformers` that computes what `config` says, with new weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        import transformers

        settings = write_settings(config)
        architecture = getattr(transformers, settings["architectures"][0])
        # Some classes have a padding id beyond a small vocabulary.
        self.model = architecture(transformers.AutoConfig.for_model(
            **{"pad_token_id": 0, **settings}))
        if not config.tie_embeddings:  # T5's class unties its head only when it reads weights
            head = self.model.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone())

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor,
                encoder_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """Computes the loss. A decoder's targets are its tokens, which the class shifts itself."""
        if encoder_tokens is None:
            return self.model(input_ids=tokens, labels=targets).loss
        return self.model(input_ids=encoder_tokens, decoder_input_ids=tokens, labels=targets).loss


def torch_model(config: ModelConfig, seq_len: int, device: str) -> nn.Module:
    """Returns a module that computes the loss of (tokens, targets), with new weights.

    It is in training mode if there is dropout.

    Raises:
      UserError: no class of `transformers` computes this model.
    """
    if lacking(config):
        model: nn.Module = _Library(config)
    else:
        assert isinstance(config, DecoderConfig)
        model = _Decoder(config, seq_len, device)
    return model.to(device).train(config.dropout > 0)


def torch_step(config: ModelConfig, batch: Mapping[str, np.ndarray], *, dtype: str, platform: str,
               compiled: bool) -> Callable[[int], None]:
    """Returns a function that runs n train steps and waits for them.

    A step is forward, backward, clipping and fused AdamW.

    Args:
      config: of the model.
      batch: the arrays of a batch of lmjax; each row counts as one document.
      dtype: "float32", or "bfloat16" for autocast over float32 weights.
      platform: "cpu" or "gpu".
      compiled: whether to use `torch.compile`.
    Raises:
      UserError: no class of `transformers` computes this model.
    """
    device = "cuda" if platform == "gpu" else "cpu"
    arrays = {name: torch.tensor(batch[name], dtype=torch.long, device=device)
              for name in ("tokens", "targets", "encoder_tokens") if name in batch}
    if lacking(config):
        predicted = torch.tensor(batch["loss_mask"], device=device) > 0
        arrays["targets"] = (arrays["tokens"] if config.family == "decoder" else
                             arrays["targets"].masked_fill(~predicted, -100))
    model = torch_model(config, arrays["tokens"].shape[1], device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                  fused=True)
    run = torch.compile(model) if compiled else model

    def steps(n: int) -> None:
        for _ in range(n):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = run(**arrays)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        float(loss.detach())

    return steps
