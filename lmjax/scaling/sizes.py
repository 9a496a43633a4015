"""The same model wider, narrower, deeper or shallower."""

import dataclasses
from collections.abc import Sequence

from lmjax.errors import UserError
from lmjax.models.encdec import EncDecConfig
from lmjax.models.model import ModelConfig

PARAMETRIZATIONS = ("standard", "mup", "completep")


@dataclasses.dataclass(frozen=True)
class Size:
    """A width and a depth."""

    embed_dim: int
    num_layers: int

    @property
    def name(self) -> str:
        """For directories and tables."""
        return f"{self.embed_dim}x{self.num_layers}"


def resized(config: ModelConfig, size: Size, where: str = "--widths") -> list[str]:
    """The overrides, KEY=VALUE, that give a model another width and depth.

    The number of heads and the MLP grow with the width; the heads keep their size. `where` names
    the option that the size comes from.

    Raises:
      UserError: the heads do not divide, or a pattern of layers does not fit.
    """
    found = {"embed_dim": size.embed_dim, "num_layers": size.num_layers}
    for key in ("num_heads", "num_kv_heads"):
        heads, rest = divmod(getattr(config, key) * size.embed_dim, config.embed_dim)
        if rest or (not heads and getattr(config, key)):
            raise UserError(f"a width with which {key}={getattr(config, key)} of embed_dim="
                            f"{config.embed_dim} becomes an integer", size.embed_dim,
                            "choose another width, or change the heads", where=where)
        found[key] = heads
    grown = {"mlp_dim": config.mlp_dim, "moe.mlp_dim": config.moe.mlp_dim,
             "moe.shared_dim": config.moe.shared_dim}
    found |= {key: max(1, round(dim * size.embed_dim / config.embed_dim))
              for key, dim in grown.items() if dim}
    if isinstance(config, EncDecConfig) and config.num_encoder_layers:
        found["num_encoder_layers"] = max(
            1, round(config.num_encoder_layers * size.num_layers / config.num_layers))
    return [f"model.{key}={value}" for key, value in found.items()]


def based_on(config: ModelConfig, parametrization: str, base: Size) -> list[str]:
    """The overrides that give a model a parametrization; base dimensions of its own stay."""
    if parametrization not in PARAMETRIZATIONS:
        raise UserError(f"one of {', '.join(PARAMETRIZATIONS)}", repr(parametrization),
                        "choose one", where="--parametrizations")
    return [f"model.parametrization={parametrization}",
            f"model.base_embed_dim={config.base_embed_dim or base.embed_dim}",
            f"model.base_num_layers={config.base_num_layers or base.num_layers}"]


def check_sizes(values: Sequence[int], where: str) -> None:
    """Refuses fewer than two different sizes."""
    if len(set(values)) < 2 or len(set(values)) < len(values) or min(values) < 1:
        raise UserError("at least two different sizes of at least 1", list(values), "correct them",
                        where=where)
