"""What of Hugging Face a path is: a model, a hub's cache, a file, an adapter, a tokenizer."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lmjax.data.tokenizers import HF_FILES
from lmjax.errors import UserError
from lmjax.huggingface.directory import HFModel, is_hf_directory, read_directory
from lmjax.huggingface.peft import is_peft_directory, read_peft
from lmjax.huggingface.tokenizers import SENTENCEPIECE

NAME = r"[\w.-]+(/[\w.-]+)?"  # a model's name on the hub: org/name, or name alone
CACHED = "models--"  # the hub's cache keeps org/name in models--org--name


class Place(NamedTuple):
    """What a path is, and whether it is whole."""

    kind: str  # "model", "hub cache", "weights file", "GGUF file", "adapter", "tokenizer" or ""
    path: Path  # what lmjax reads: of a hub's cache, its snapshot
    fault: UserError | None  # why lmjax cannot read a model there; None if it can
    model: HFModel | None  # what was read of it


def kind_of(path: str | os.PathLike) -> str:
    """Says what of Hugging Face `path` is (`Place.kind`), by names alone; "" if nothing of it."""
    return _kind(Path(path)) or ("hub cache" if _is_cached(path) else "")


def identify(path: str | os.PathLike) -> Place:
    """Says what of Hugging Face `path` is, and whether its files are whole.

    Of the weights it reads only the tensors that a file may hold under two names.
    """
    kind, found, model = kind_of(path), Path(path), None
    try:
        found = locate(path)
        if is_peft_directory(found):
            read_peft(found)
        elif kind and kind != "tokenizer":
            model = read_directory(found)
    except UserError as error:
        return Place(kind, found, error, None)
    return Place(kind, found, None, model)


def locate(path: str | os.PathLike) -> Path:
    """Returns the directory of a model in a hub's cache, of a name in it, or of a weights file.

    Any other path is returned as it is.

    Raises:
      UserError: the path is a GGUF file, or a part of something that must be whole.
    """
    where = in_cache(path)
    kind = _kind(where)
    if kind == "GGUF file":
        raise UserError("a checkpoint or a directory with config.json and safetensors",
                        "a GGUF file", "make a checkpoint of it: lmjax import-gguf FILE --out DIR",
                        str(where))
    if kind == "weights file":
        if where.name != "model.safetensors":
            raise UserError("a model's directory", f"the file {where.name} alone", "name its "
                            "directory; rename a variant to model.safetensors first",
                            str(where.parent))
        return where.parent
    return where


def in_cache(path: str | os.PathLike) -> Path:
    """Returns the directory of a model in a hub's cache, or of a name in it; else `path`.

    Raises:
      UserError: the cache does not say which snapshot of the model it means.
    """
    where = _cached(path) if _is_cached(path) else Path(path)
    return _snapshot(where) if (where / "snapshots").is_dir() else where


def _kind(path: Path) -> str:
    if path.is_file():
        return {".gguf": "GGUF file", ".safetensors": "weights file"}.get(path.suffix, "")
    if (path / "snapshots").is_dir():
        return "hub cache"
    if is_peft_directory(path):
        return "adapter"
    if path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        return "GGUF file"
    if path.is_dir() and is_hf_directory(path):
        return "model"
    has_tokenizer = any((path / name).is_file() for name in (SENTENCEPIECE, HF_FILES[0]))
    return "tokenizer" if has_tokenizer and not (path / "config.json").exists() else ""


def _is_cached(path: str | os.PathLike) -> bool:
    """Whether `path` is the name of a model in the hub's cache."""
    return (not Path(path).exists() and re.fullmatch(NAME, str(path)) is not None
            and _cached(path).is_dir())


def _cached(name: str | os.PathLike) -> Path:
    """Where the hub's cache keeps the model of this name."""
    return _cache() / (CACHED + str(name).replace("/", "--"))


def _cache() -> Path:
    """The hub's cache, where huggingface_hub looks for it."""
    e = os.environ
    home = e.get("HF_HOME") or Path(e.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    hub = e.get("HF_HUB_CACHE") or e.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expandvars(hub)).expanduser()


def _snapshot(cached: Path) -> Path:
    """The snapshot of a cached model that its `main` names, or the only one."""
    main = cached / "refs" / "main"
    held = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    if main.is_file():
        wanted = cached / "snapshots" / main.read_text(encoding="utf-8").strip()
        held = [path for path in held if path == wanted]
    if len(held) != 1:
        raise UserError("refs/main to name a snapshot", f"{len(held)} snapshots to choose from",
                        "fetch the model again, or name a directory of snapshots/", str(cached))
    return held[0]
