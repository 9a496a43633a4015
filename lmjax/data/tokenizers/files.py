"""The files of a tokenizer's directory: how they are kept, and what they say of special tokens."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lmjax.errors import UserError

# The first file is required; the others name the special tokens.
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
ROLES = ("bos", "eos", "pad", "cls", "sep", "mask")


def split_files(files: Mapping[str, bytes]) -> dict[str, dict[str, str]]:
    """Returns files as JSON values, which `join_files` turns back byte for byte.

    Raises:
      UserError: a file of `HF_FILES` is not UTF-8.
    """
    texts: dict[str, str] = {}
    for name in HF_FILES:
        try:
            texts |= {name: files[name].decode()} if name in files else {}
        except UnicodeDecodeError as error:
            raise UserError(f"{HF_FILES[0]} and what belongs to it in UTF-8", error,
                            "fetch the directory again", where=name) from None
    others = {name: base64.b64encode(raw).decode() for name, raw in files.items()
              if name not in HF_FILES}
    return {"files": texts} | ({"others": others} if others else {})


def join_files(parts: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the files of which `split_files` made `parts`."""
    return ({name: text.encode() for name, text in parts["files"].items()}
            | {name: base64.b64decode(text) for name, text in parts.get("others", {}).items()})


def tokenizer_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Returns tokenizer_config.json with the names of special_tokens_map.json.

    If the two differ, the map decides, as in `transformers`; but it is not read beside a
    tokenizer_config.json that lists the added tokens.
    """
    settings, names = (json.loads(files.get(name, b"{}")) for name in HF_FILES[1:])
    return settings if "added_tokens_decoder" in settings else settings | names


def name_of(token: Any) -> str | None:
    """The name of a token that a file gives as a text or as an object; None for neither."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def named_tokens(files: Mapping[str, bytes],
                 names: Mapping[str, str] = MappingProxyType({})) -> dict[str, str | None]:
    """The names that a directory's files, or else `names`, give to the tokens of `ROLES`."""
    settings = {**names, **tokenizer_settings(files)}
    return {role: name_of(settings.get(f"{role}_token")) for role in ROLES}


def stated_ends(files: Mapping[str, bytes], bos: int | None,
                eos: int | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The ids before and after a text, if tokenizer_config.json states them.

    Args:
      files: of the directory.
      bos, eos: the ids of these tokens; None: there is none.
    Returns:
      (ids before, ids after), or None if add_bos_token and add_eos_token are both missing.
    """
    settings = tokenizer_settings(files)
    keys = ("add_bos_token", "add_eos_token")
    if not any(key in settings for key in keys):
        return None
    before, after = (() if i is None or not settings.get(key) else (i,)
                     for key, i in zip(keys, (bos, eos), strict=True))
    return before, after
