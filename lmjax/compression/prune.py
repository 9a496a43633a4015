"""A model with less in it: fewer layers, heads and channels, or more zeros.

    lm = lmjax.load("runs/quickstart")
    small = prune(lm, Pruning(layers=1, mlp=0.25), texts=texts)
    small.save("runs/quickstart-pruned")
"""

import dataclasses
from collections.abc import Callable, Sequence

from lmjax.compression.sparse import TWO_OF_FOUR, with_zeros
from lmjax.compression.structure import without_parts
from lmjax.errors import UserError
from lmjax.lm import LM


@dataclasses.dataclass(frozen=True)
class Pruning:
    """What is removed from a model."""

    layers: int = 0  # how many
    heads: float = 0.0  # share of the key heads of every layer, each with its query heads
    mlp: float = 0.0  # share of the channels of every MLP
    # Share of the inputs of every output that get weight 0, or "2:4": two of each four in a row.
    weights: float | str = 0.0

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise UserError("0 or more", self.layers, "change it", where="layers")
        for name in ("heads", "mlp", "weights"):
            share = getattr(self, name)
            if share != TWO_OF_FOUR and not (isinstance(share, float | int) and 0 <= share < 1):
                raise UserError("a share from 0 to below 1", share, "change it", where=name)
        if not (self.layers or self.heads or self.mlp or self.weights):
            raise UserError("layers, heads, mlp or weights to remove", "none", "name one", "prune")


def parse_pruning(text: str) -> Pruning:
    """Reads what `--prune` says, such as "layers=2,heads=0.25" or "weights=2:4".

    Raises:
      UserError: an unknown name, one that is given twice, or a value that is none.
    """
    found: dict[str, float | str] = {}
    names = [field.name for field in dataclasses.fields(Pruning)]
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in names or name in found:
            raise UserError(f"{', '.join(names)}, each at most once", repr(part),
                            "write layers=2,heads=0.25,mlp=0.25 or weights=2:4", "--prune")
        try:
            found[name] = (value if (name, value) == ("weights", TWO_OF_FOUR) else
                           int(value) if name == "layers" else float(value))
        except ValueError:
            raise UserError("a number of layers" if name == "layers" else "a share such as 0.25",
                            repr(value), "change it", where=f"--prune {name}") from None
    return Pruning(**found)  # type: ignore[arg-type]


def prune(lm: LM, pruning: Pruning, *, texts: Sequence[str] = (),
          log: Callable[[str], None] = print) -> LM:
    """Removes what matters least.

    Layers, heads and channels are removed first; weights are measured in what is left.

    Args:
      lm: a model with float32 weights, without adapters.
      pruning: how much is removed.
      texts: what the model reads. Layers, heads and channels need them. Weights are ranked by the
        product of their magnitudes and those of their inputs (Wanda, Sun et al. 2023,
        arXiv:2306.11695); without texts, by their magnitudes.
      log: prints a line for the user.

    Raises:
      UserError: the weights are packed, the model has adapters, there are no texts or too short
        ones, or the model has not so much to remove.
    """
    if lm.model.quantization.weights:
        raise UserError("a model with float32 weights", lm.model.quantization.weights,
                        "prune the model that it was made from", where=lm.source or "prune")
    if lm.model.adapter.kind:
        raise UserError("a model without adapters", "one with adapters", "merge them first: "
                        "lmjax.load(DIR).merge().save(NEW)", where=lm.source or "prune")
    if pruning.layers or pruning.heads or pruning.mlp:
        lm = without_parts(lm, layers=pruning.layers, heads=pruning.heads, mlp=pruning.mlp,
                           texts=texts, log=log)
    if pruning.weights:
        lm = with_zeros(lm, pruning.weights, texts=texts, log=log)
    about = lm.about | {"pruning": dataclasses.asdict(pruning)}
    return LM(lm.model, lm.params, lm.layout, lm.tokenizer, lm.recipe, about, lm.source)
