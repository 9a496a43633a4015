"""The held-out loss: every token of the batches counts once, padding does not."""

import math
from collections.abc import Callable, Iterable

import jax

from lmjax.data.pipeline import Split
from lmjax.errors import UserError
from lmjax.models.model import Batch
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params


def evaluate(eval_step: Callable[[Params, Batch], Loss], params: Params, batches: Iterable[Batch],
             split: Split) -> dict[str, float]:
    """Evaluates `params` on `batches` of `split`.

    Returns:
      loss (nats per token), perplexity, the figures of `bits_per_byte`, and tokens (how many
      counted).

    Raises:
      UserError: no token counts.
    """
    # Summed on the host in float64, in the order of the batches: the sum is always the same.
    sums: list[Loss] = []
    for batch in batches:
        sums.append(eval_step(params, batch))
        jax.block_until_ready(sums[:-2][-1:])  # at most two batches wait on the device
    tokens = sum(float(s.weight) for s in sums)
    if not tokens:
        raise UserError("held-out tokens", "none", "raise data.heldout_fraction or set "
                        "eval.every=0", where="eval")
    loss = sum(float(s.nats) for s in sums) / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            **bits_per_byte(loss, split), "tokens": int(tokens)}


def bits_per_byte(nats_per_token: float, split: Split) -> dict[str, float]:
    """Returns bits_per_byte, of text. Unlike nats per token, they compare between tokenizers.

    With a tokenizer that loses text they are of the decoded text: `of_decoded_text` is then 1.
    """
    bits = nats_per_token / math.log(2) * split.predictions / max(split.bytes, 1)
    return {"bits_per_byte": bits} | ({} if split.exact else {"of_decoded_text": 1.0})


def bits_unit(split: Split) -> str:
    """The unit of `bits_per_byte`, as it is shown."""
    return "bits/byte" if split.exact else "bits/byte of decoded text"
