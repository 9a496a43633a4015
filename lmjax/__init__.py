"""lmjax: pretrains Transformer language models in JAX, from raw text to an exported checkpoint."""

import importlib.metadata
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lmjax.lm import LM as LM
    from lmjax.lm import load as load

__all__ = ["LM", "load", "versions"]


def versions() -> dict[str, str]:
    """Returns the version of lmjax and of the libraries that decide the result of a run."""
    return {"lmjax": __version__} | installed(
        "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorstore",
        "sentencepiece")


def installed(*packages: str) -> dict[str, str]:
    """Returns the version of every package that is installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def __getattr__(name: str) -> Any:
    # JAX is imported when a model is loaded, so that `import lmjax` takes no time.
    if name in ("load", "LM"):
        from lmjax import lm

        return getattr(lm, name)
    raise AttributeError(f"module 'lmjax' has no attribute {name!r}")
