"""The `optimizer` group of a recipe."""

import dataclasses

from lmjax.config import at_least
from lmjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates of the weights."""

    name: str = "adamw"  # a row of table.OPTIMIZERS; muon takes AdamW for all but matrices
    peak_lr: float = 3e-4  # learning rate after warm-up: Muon takes AdamW's, Lion about a fifth
    schedule: str = "cosine"  # a row of schedules.SCHEDULES
    warmup_steps: int = 100  # steps of linear increase from peak_lr/(warmup_steps+1); 0: none
    # Share of peak_lr at which the decay ends, one step past the last one: with 0 no step is
    # wasted. inverse_sqrt and constant do not use it.
    final_lr_fraction: float = 0.1
    decay_fraction: float = 0.2  # share of all steps in which `wsd` decays
    b1: float = 0.9  # decay of the first moment (AdamW, Lion)
    b2: float = 0.95  # decay of the second moment (AdamW, Lion)
    eps: float = 1e-8  # added to the root of the second moment (AdamW)
    momentum: float = 0.9  # of sgd
    muon_momentum: float = 0.95  # Muon's Nesterov momentum
    muon_iterations: int = 5  # Muon's Newton-Schulz iterations
    weight_decay: float = 0.1  # times the learning rate, decoupled from the gradient; matrices only
    decay_embeddings: bool = False  # also decays embedding tables, the output's included
    clip_norm: float = 1.0  # largest global norm of a gradient; 0: no clipping
    ema_decay: float = 0.0  # decay of the moving average of the weights; 0: no average

    def __post_init__(self) -> None:
        at_least(0, peak_lr=self.peak_lr, warmup_steps=self.warmup_steps,
                 weight_decay=self.weight_decay, clip_norm=self.clip_norm, eps=self.eps)
        at_least(1, muon_iterations=self.muon_iterations)
        for key in ("b1", "b2", "momentum", "muon_momentum", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"0 <= {key} < 1", getattr(self, key), "change it", where=key)
        for key in ("final_lr_fraction", "decay_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError("0 to 1", getattr(self, key), "write it as a fraction", where=key)
        if self.schedule == "exponential" and self.final_lr_fraction == 0:
            raise UserError("more than 0 for the exponential schedule", 0, "set it to 0.01, say",
                            where="final_lr_fraction")
