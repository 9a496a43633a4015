"""The `optimizer` group of a recipe."""

import dataclasses

from lmjax.config import at_least, choice, pattern
from lmjax.errors import UserError

KINDS = ("matrix", "embedding", "unembedding", "vector")


@dataclasses.dataclass(frozen=True)
class GroupConfig:
    """Parameters that learn in another way: all of a kind, or those whose paths match, or both."""

    parameters: str = ""  # a regular expression, searched in their paths; "": any path
    multiplier: float = 1.0  # of the learning rate, and so of the weight decay
    # matrix, embedding (of tokens or positions; a tied table is one), unembedding (of tokens or
    # classes), vector (a scale or a bias); "": any kind
    kind: str = ""
    # As in the optimizer, for these parameters; None: the optimizer's. A group of embeddings or
    # vectors that sets weight_decay is decayed.
    b1: float | None = None  # of AdamW
    b2: float | None = None  # of AdamW
    weight_decay: float | None = None
    decay_fraction: float | None = None
    final_lr_fraction: float | None = None

    def __post_init__(self) -> None:
        pattern("parameters", self.parameters)
        if self.kind:
            choice("kind", self.kind, KINDS)
        elif not self.parameters:
            raise UserError(f"a regular expression, or a kind ({', '.join(KINDS)})", "neither",
                            "set one of them", where="parameters")
        at_least(0, multiplier=self.multiplier, weight_decay=self.weight_decay or 0.0)
        _check_shares(self)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates of the weights."""

    # A row of table.OPTIMIZERS. muon uses AdamW for everything but matrices: for embedding tables,
    # scales and biases.
    name: str = "adamw"
    # Learning rate after warm-up. With Muon, use the rate that you would use for AdamW; with Lion,
    # about a fifth of it.
    peak_lr: float = 3e-4
    schedule: str = "cosine"  # a row of schedules.SCHEDULES
    warmup_steps: int = 100  # steps of linear increase from peak_lr/(warmup_steps+1); 0: none
    # The decay reaches this share of peak_lr one step after the last step, so that even with 0 the
    # last step has a learning rate above 0. The schedules inverse_sqrt and constant ignore it.
    final_lr_fraction: float = 0.1
    # wsd (warm-up, stable, decay): the fraction of all steps, the last ones, in which it decays.
    decay_fraction: float = 0.2
    # AdamW: decay of the first moment. Lion: how much of the momentum, against the gradient, an
    # update takes.
    b1: float = 0.9
    b2: float = 0.95  # AdamW: decay of the second moment. Lion: decay of the momentum
    eps: float = 1e-8  # added to the root of the second moment (AdamW)
    momentum: float = 0.9  # of sgd
    muon_momentum: float = 0.95  # Muon's Nesterov momentum
    muon_iterations: int = 5  # Muon's Newton-Schulz iterations
    # Each step subtracts learning rate x weight_decay x weight, whatever the gradient is (decoupled
    # decay); matrices only.
    weight_decay: float = 0.1
    decay_embeddings: bool = False  # also decays embedding tables, including that of the output
    groups: tuple[GroupConfig, ...] = ()  # the first that a parameter is in counts
    # Each layer learns at this multiple of the rate of the layer above it; 1: all at one rate.
    layer_decay: float = 1.0
    clip_norm: float = 1.0  # largest global norm of a gradient; 0: no clipping
    ema_decay: float = 0.0  # decay of the moving average of the weights; 0: no average

    def __post_init__(self) -> None:
        at_least(0, peak_lr=self.peak_lr, warmup_steps=self.warmup_steps,
                 weight_decay=self.weight_decay, clip_norm=self.clip_norm, eps=self.eps)
        at_least(1, muon_iterations=self.muon_iterations)
        if not 0 < self.layer_decay <= 1:
            raise UserError("0 < layer_decay <= 1", self.layer_decay, "change it",
                            where="layer_decay")
        _check_shares(self)
        if self.schedule == "exponential" and self.final_lr_fraction == 0:
            raise UserError("more than 0 for the exponential schedule", 0, "set it to 0.01, say",
                            where="final_lr_fraction")


def _check_shares(config: GroupConfig | OptimizerConfig) -> None:
    """Refuses decays that are not in [0, 1) and fractions that are not in [0, 1]."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for key in ("b1", "b2", "momentum", "muon_momentum", "ema_decay"):
        if not 0 <= (values.get(key) or 0) < 1:
            raise UserError(f"0 <= {key} < 1", values[key], "change it", where=key)
    for key in ("final_lr_fraction", "decay_fraction"):
        if not 0 <= (values.get(key) or 0) <= 1:
            raise UserError("0 to 1", values[key], "write it as a fraction", where=key)
