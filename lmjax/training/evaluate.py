"""Held-out loss: every token of a split once, padding masked."""

import math
from collections.abc import Callable, Iterable

import jax

from lmjax.data.pipeline import Split
from lmjax.models.model import Batch
from lmjax.nn.module import Params
from lmjax.training.losses import Loss


def evaluate(eval_step: Callable[[Params, Batch], Loss], params: Params, batches: Iterable[Batch],
             split: Split) -> dict[str, float]:
    """`loss` (nats a token), `perplexity`, `bits_per_byte` and `tokens` over `batches` of `split`.

    Raises:
      ValueError: no token in them.
    """
    # Summed on the host in float64, in the order of the batches: the result does not depend on timing.
    sums: list[Loss] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[:-2][-1:])  # two ahead, so that batches do not pile up
    tokens = sum(float(s.weight) for s in sums)
    if not tokens:
        raise ValueError("eval: expected held-out tokens, got none; raise data.heldout_fraction or set eval.every=0")
    loss = sum(float(s.nats) for s in sums) / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_byte(loss, split),
            "tokens": int(tokens)}


def bits_per_byte(nats_per_token: float, split: Split) -> float:
    """Bits for every byte of the text: comparable between tokenizers, which nats a token are not."""
    return nats_per_token / math.log(2) * split.predictions / split.bytes
