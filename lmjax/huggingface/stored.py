"""Which of a file's tensors a model reads: wrappers, older names, several names of one tensor."""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lmjax.errors import UserError
from lmjax.huggingface.row_orders import in_order
from lmjax.huggingface.schema import ModelType
from lmjax.huggingface.tensors import STORED_DTYPES, Entry, equal_tensors, read_tensor
from lmjax.huggingface.weights import Stored
from lmjax.models.model import ModelConfig
from lmjax.nn.layers import MLP_KINDS
from lmjax.nn.positions import SINUSOIDS, sinusoids

Entries = Mapping[str, Entry]
# What torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
PARALLEL = "module."  # DataParallel puts it before all names
# Older files name the parameters of a LayerNorm so.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Patterns of buffers that some files hold. transformers makes them anew and never reads them.
BUFFERS = (r"(.*\.)?rotary_emb\w*\.(\w*inv_freq|\w*_cached)",
           r"(.*\.)?embeddings\.(position_ids|token_type_ids)")
POSITIONS = r"model\.(encoder|decoder)\.embed_positions\.weight"


def plain_names(entries: Entries, model_type: ModelType, where: str) -> dict[str, Entry]:
    """Gives tensors the names of the model type's table, whatever wrapped the model that was saved.

    Raises:
      UserError: two tensors would get one name.
    """
    names = {name: re.sub(WRAPPERS, "", name) for name in entries}
    while names and all(name.startswith(PARALLEL) for name in names.values()):
        names = {stored: name.removeprefix(PARALLEL) for stored, name in names.items()}
    for old, new in OLD_NAMES.items():
        names = {stored: name.replace(old, new) for stored, name in names.items()}
    prefix = model_type.prefix
    if prefix and not any(name.startswith(prefix) for name in names.values()):
        tops = {row.theirs.split(".")[0] for row in model_type.table.values()
                if not row.theirs.startswith(prefix)}
        names = {stored: name if name.split(".")[0] in tops else prefix + name
                 for stored, name in names.items()}
    out: dict[str, Entry] = {}
    for stored, name in names.items():
        if name in out:
            raise UserError(f"one tensor for {name}", f"{stored} and {out[name].name}",
                            "remove one of them", where)
        out[name] = entries[stored]
    return out


def rows_for(model_type: ModelType, config: ModelConfig) -> dict[str, Stored]:
    """Where each parameter of a model with this config is stored."""
    rows = dict(model_type.table)
    if not MLP_KINDS[config.mlp][1]:
        rows |= model_type.ungated
    if not config.tie_embeddings:
        rows |= model_type.untied
    if model_type.by_config is not None:
        rows |= model_type.by_config(config)
    return in_order(rows, model_type, config)


def without_further_layers(entries: Entries, model_type: ModelType,
                           config: ModelConfig) -> tuple[dict[str, Entry], int]:
    """Leaves out the tensors of layers after the last, and counts these layers."""
    if not model_type.further_layers:
        return dict(entries), 0
    numbers = {name: int(found[1]) for name in entries
               if (found := re.match(r"model\.layers\.(\d+)\.", name))}
    beyond = {name: i for name, i in numbers.items() if i >= config.num_layers}
    return ({name: entry for name, entry in entries.items() if name not in beyond},
            len(set(beyond.values())))


def one_of_each(entries: Entries, model_type: ModelType, config: ModelConfig,
                where: str) -> tuple[dict[str, Entry], ModelConfig]:
    """Leaves one tensor where a file may hold one under several names.

    This follows transformers. If a file holds only one of several tied names, all mean that one. A
    head that differs from the embedding is not tied to it, whatever config.json says.

    Returns:
      The tensors under the names of the model type's table, and the config, untied if the head
      differs.

    Raises:
      UserError: tensors differ that are one in lmjax's model.
    """
    out, is_tied = dict(entries), config.tie_embeddings
    for group in model_type.shared:
        _merge(out, group, group[0], where)
    head = model_type.table["head/table"].theirs
    if is_tied and head in out:
        embedding = model_type.table["embedding/table"].theirs
        if embedding in out and not equal_tensors(out[head], out[embedding]):
            config = dataclasses.replace(config, tie_embeddings=False)
        else:
            out[embedding] = out.pop(head)
    names = {row.theirs for row in rows_for(model_type, config).values()}
    for group in model_type.tied:
        kept = next(name for name in group if name in names)
        if is_tied:
            _merge(out, group, kept, where)
        else:  # transformers reads no other name of the group
            out = {name: entry for name, entry in out.items() if name not in group or name == kept}
    if config.positions in SINUSOIDS:
        for name in [name for name in out if re.fullmatch(POSITIONS, name)]:
            _check_sinusoids(name, out.pop(name), config, where)
    return out, config


def _merge(entries: dict[str, Entry], group: Sequence[str], kept: str, where: str) -> None:
    """Replaces the tensors of `group`, which must be equal, by one named `kept`."""
    held = [name for name in group if name in entries]
    for name in held[1:]:
        if not equal_tensors(entries[held[0]], entries[name]):
            raise UserError(f"{name} to equal {held[0]}, with which it is one tensor",
                            "other values", "remove the one that is not used", where)
    if held:
        found = entries[held[0]]
        for name in held:
            del entries[name]
        entries[kept] = found


def _check_sinusoids(name: str, entry: Entry, config: ModelConfig, where: str) -> None:
    dtype = STORED_DTYPES.get(entry.dtype, np.dtype(np.float32))
    stored = read_tensor(entry).astype(np.float32)
    positions = jnp.arange(len(stored), dtype=jnp.int32)[None]
    made = np.array(sinusoids(positions, config.embed_dim, config.positions))[0]
    if config.position_offset:
        made[config.position_offset - 1] = 0  # the row of padding
    # float32 angles of late positions are off by some 1e-4.
    if stored.shape != made.shape or not np.allclose(
            stored, made, rtol=0, atol=max(2e-4, float(jnp.finfo(dtype).eps))):
        raise UserError(f"{name} to be the sinusoids of its positions", "other values",
                        "use a model whose positions were not trained", where)
