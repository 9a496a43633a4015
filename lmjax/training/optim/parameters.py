"""What a parameter is to an optimizer: a matrix, an embedding table or a vector.

Scanned layers are stacked on a leading axis, so the rank of a parameter does not tell: ("layers",
"norm") is one vector per layer, ("layers", "embed", "heads", "head_dim") one matrix per layer. The
names of the axes do.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax

Axes = tuple[str, ...]
ParameterKind = Literal["matrix", "embedding", "vector"]

STACKED = ("layers", "experts")  # leading axes that stack separate parameters
# An axis of these names makes a table: an embedding, or what scores a vocabulary or classes.
TABLES = ("vocab", "positions", "outputs")


def kind_of(axes: Axes) -> ParameterKind:
    """Returns the kind of a parameter with these axis names, or of each parameter stacked in it."""
    own = own_axes(axes)
    if "norm" in own:  # scales and biases, of any rank
        return "vector"
    if set(own) & set(TABLES):
        return "embedding"
    return "matrix" if len(sides(axes)) >= 2 else "vector"


def own_axes(axes: Axes) -> Axes:
    """Returns `axes` without the leading ones that stack separate parameters."""
    lead = 0
    while lead < len(axes) and axes[lead] in STACKED:
        lead += 1
    return axes[lead:]


def sides(axes: Axes) -> list[tuple[int, ...]]:
    """Groups the dimensions of a matrix into its sides.

    (heads, head_dim) and (kv_heads, head_dim) form one side; any other axis is a side of its own.
    """
    found: list[tuple[int, ...]] = []
    for i in range(len(axes) - len(own_axes(axes)), len(axes)):
        if axes[i] == "head_dim" and found and axes[i - 1] in ("heads", "kv_heads"):
            found[-1] = (i - 1, i)
        else:
            found.append((i,))
    return found


def map_axes(fn: Callable[[Axes], Any], axes: Any) -> Any:
    """Applies `fn` to the axis names of every parameter; `axes` is a tree of nested dicts."""
    return jax.tree.map(fn, axes, is_leaf=lambda x: isinstance(x, tuple))
