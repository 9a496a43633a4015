"""What the recipes for pods have in common: a published model, rows of web text, and AdamW as such runs have it."""

from typing import Any

from ml_collections import ConfigDict

from lmjax.models.presets import PRESETS


def pod(preset: str, *, batch_size: int, seq_len: int, tokens: float, mesh: dict[str, Any], peak_lr: float = 3e-4,
        reserved: int = 0, loss_chunk: int = 0, **model: Any) -> ConfigDict:
    """A recipe that trains `preset`, with the switches of `model` changed, on `tokens` tokens.

    batch_size: rows of seq_len tokens a step, over all chips. mesh: as in `MeshConfig`. reserved: ids of the model's
    vocabulary that the tokenizer leaves to the objective or to padding. loss_chunk: as in `TrainConfig`.
    """
    config = ConfigDict()
    config.model = dict(preset=preset, **model)
    config.data = dict(
        sources=[dict(name="c4", uri="tfds:c4/en")],
        tokenizer=dict(vocab_size=PRESETS[preset]["vocab_size"] - reserved),
        seq_len=seq_len,
    )
    config.mesh = dict(mesh)
    config.optimizer = dict(name="adamw", peak_lr=peak_lr, warmup_steps=2000, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    config.train = dict(batch_size=batch_size, loss_chunk=loss_chunk, steps=int(tokens / batch_size / seq_len))
    config.eval = dict(every=1000, batches=16)
    config.checkpoint = dict(every=1000, keep_last=2)
    config.watch = dict(stall_seconds=1800)  # a host that hangs would hold all the others' chips for ever
    return config
