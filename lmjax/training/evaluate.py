"""The held-out loss: every token of the batches counts once, padding does not."""

import math
from collections.abc import Callable, Iterable, Mapping

import jax

from lmjax.data.pipeline import Split
from lmjax.errors import UserError
from lmjax.models.model import Batch
from lmjax.monitoring.units import human_count
from lmjax.nn.losses import Loss
from lmjax.nn.module import Params


def evaluate(eval_step: Callable[[Params, Batch], Loss], params: Params, batches: Iterable[Batch],
             split: Split, collect: Callable[[Loss], None] = lambda sums: None) -> dict[str, float]:
    """Evaluates `params` on `batches` of `split`.

    Args:
      eval_step, params, batches, split: what to evaluate, on what.
      collect: called with what the step gave for each batch.

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
        collect(sums[-1])
    tokens = sum(float(s.weight) for s in sums)
    if not tokens:
        raise UserError("held-out tokens", "none", "raise data.heldout_fraction or set "
                        "eval.every=0", where="eval")
    loss = sum(float(s.nats) for s in sums) / tokens
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)),
            **bits_per_byte(loss, split), "tokens": int(tokens)}


def bits_per_byte(nats_per_token: float, split: Split) -> dict[str, float]:
    """Returns bits_per_byte, of text; nothing for examples, whose bytes are not counted.

    Unlike nats per token, they compare between tokenizers.

    With a tokenizer that loses text they are of the decoded text: `of_decoded_text` is then 1.
    """
    if not split.bytes:
        return {}
    bits = nats_per_token / math.log(2) * split.predictions / max(split.bytes, 1)
    return {"bits_per_byte": bits} | ({} if split.exact else {"of_decoded_text": 1.0})


def summary(found: Mapping[str, float], split: Split) -> str:
    """The figures of an evaluation in a line."""
    if "bits_per_byte" in found:
        return (f"loss {found['loss']:.4f}, {found['bits_per_byte']:.4f} {bits_unit(split)}, "
                f"perplexity {found['perplexity']:.1f} over {human_count(found['tokens'])} tokens")
    others = [f"{name} {value:.4f}" for name, value in found.items()
              if name not in ("loss", "perplexity", "tokens", "examples", "answered", "best_step")]
    examples = f" over {human_count(found.get('examples', found['tokens']))} examples"
    if "answered" in found:
        examples += f", {human_count(found['answered'])} of them answered"
    return ", ".join([f"loss {found['loss']:.4f}", *others]) + examples


def bits_unit(split: Split) -> str:
    """The unit of `bits_per_byte`, as it is shown."""
    return "bits/byte" if split.exact else "bits/byte of decoded text"
