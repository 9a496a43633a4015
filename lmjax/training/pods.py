"""What recipes for pods have in common: a published model, web text, and AdamW's usual numbers."""

from typing import Any

from ml_collections import ConfigDict

from lmjax.models.presets import PRESETS


def pod(preset: str, *, batch_size: int, seq_len: int, tokens: float, mesh: dict[str, Any],
        peak_lr: float = 3e-4, reserved: int = 0, loss_chunk: int = 0, **model: Any) -> ConfigDict:
    """Returns a recipe that trains a preset.

    Args:
      preset: a name of `models.presets.PRESETS`.
      batch_size: rows per step, over all chips.
      seq_len: tokens per row.
      tokens: to train on, in all.
      mesh: as in `MeshConfig`.
      peak_lr: as in `OptimizerConfig`.
      reserved: ids of the model's vocabulary that the tokenizer leaves to the objective or to
        padding.
      loss_chunk: as in `TrainConfig`.
      **model: keys of the preset to change.
    """
    config = ConfigDict()
    config.model = dict(preset=preset, **model)
    config.data = dict(
        sources=[dict(name="c4", uri="tfds:c4/en")],
        tokenizer=dict(vocab_size=PRESETS[preset]["vocab_size"] - reserved),
        seq_len=seq_len,
    )
    config.mesh = dict(mesh)
    config.optimizer = dict(name="adamw", peak_lr=peak_lr, warmup_steps=2000, b2=0.95,
                            weight_decay=0.1, clip_norm=1.0)
    config.train = dict(batch_size=batch_size, loss_chunk=loss_chunk,
                        steps=int(tokens / batch_size / seq_len))
    config.eval = dict(every=1000, batches=16)
    config.checkpoint = dict(every=1000, keep_last=2)
    config.watch = dict(stall_seconds=1800)  # one host that hangs would hold all chips for ever
    return config
