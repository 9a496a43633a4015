"""The tokens that other files of a directory add to tokenizer.json, as `transformers` adds them."""

import json
from collections.abc import Mapping
from typing import Any

from lmjax.data.tokenizers import HF_FILES, name_of
from lmjax.errors import UserError

Token = dict[str, Any]  # "content" and the five flags of a tokenizer.json's added token
ADDED = "added_tokens.json"
# The settings that name a token, in the order in which they are added.
NAMED = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("extra_special_tokens", "additional_special_tokens")  # of which the first decides
_ROBERTA = ("<s>", "</s>", "<unk>", "</s>", "<pad>", "<s>", "<mask>")
# What a tokenizer's class names, in the order of `NAMED`, where the files leave it out.
CLASSES = {
    "BertTokenizer": (None, None, "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"),
    "RobertaTokenizer": _ROBERTA,
    "XLMRobertaTokenizer": _ROBERTA,
    "CamembertTokenizer": _ROBERTA,
    "GPT2Tokenizer": ("<|endoftext|>",) * 3,
    "Qwen2Tokenizer": (None, "<|endoftext|>", "<|endoftext|>", None, "<|endoftext|>"),
    "LlamaTokenizer": ("<s>", "</s>", "<unk>"),
    "GemmaTokenizer": ("<bos>", "<eos>", "<unk>", None, "<pad>", None, "<mask>"),
    "T5Tokenizer": (None, "</s>", "<unk>", None, "<pad>")}
# The class of a model type, where the files do not name one.
CLASS_OF = {
    "bert": "BertTokenizer", "roberta": "RobertaTokenizer", "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer", "gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer",
    "llama": "LlamaTokenizer", "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer", "t5": "T5Tokenizer", "mt5": "T5Tokenizer"}


def added_tokens(files: Mapping[str, bytes], config: Mapping[str, Any],
                 where: str) -> tuple[list[Token], dict[str, str]]:
    """What other files, and the tokenizer's class, add to tokenizer.json.

    Args:
      files: of the directory.
      config: its config.json; empty without one.
      where: the directory, for error messages.

    Returns:
      The tokens that tokenizer.json lacks or gives other flags, and the names of `NAMED` that the
      files leave to the class, such as {"eos_token": "</s>"}.

    Raises:
      UserError: a file gives a token another id than the next one.
    """
    try:
        rules = json.loads(files[HF_FILES[0]])
        ids, own = _ids(rules), {t["content"]: _token(t) for t in rules["added_tokens"]}
    except (ValueError, KeyError, TypeError):
        return [], {}  # reading the tokenizer says what is wrong
    names = _class_names(_settings(files), config, ids)
    named, extra = _named(files, names)
    special = {token["content"] for token in named}
    stated = stated_tokens(files)
    _check_ids(stated, ids, where)
    # Without this list, tokenizer.json goes before the other files.
    stated_first = "added_tokens_decoder" in _settings(files)
    out: dict[str, Token] = {}
    for token in [*(stated[i] for i in sorted(stated)), *named, *extra]:
        name = token["content"]
        if name not in out and (name not in own or (stated_first and token in stated.values())):
            out[name] = {**token, "special": token["special"] or name in special}
    return [token for name, token in out.items() if own.get(name) != token], names


def stated_tokens(files: Mapping[str, bytes]) -> dict[int, Token]:
    """The added tokens that other files than tokenizer.json give an id."""
    settings = _settings(files)
    if "added_tokens_decoder" in settings:
        return {int(i): _token(token) for i, token in settings["added_tokens_decoder"].items()}
    special = {token["content"] for part in _named(files, {}) for token in part}
    return {int(i): _token({"content": name, "special": name in special})
            for name, i in json.loads(files.get(ADDED, b"{}")).items()}


def named_contents(files: Mapping[str, bytes]) -> list[str]:
    """The tokens that the files name without giving them an id."""
    return [token["content"] for part in _named(files, {}) for token in part]


def _class_names(settings: Mapping[str, Any], config: Mapping[str, Any],
                 ids: Mapping[str, int]) -> dict[str, str]:
    """The names of `NAMED` that the files leave to the tokenizer's class, and that it has."""
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or (
        CLASS_OF.get(str(config.get("model_type"))))
    named = zip(NAMED, CLASSES.get(str(name).removesuffix("Fast"), ()), strict=False)
    return {key: token for key, token in named
            if token is not None and key not in settings and token in ids}


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json with the tokens of special_tokens_map.json, where that is read."""
    settings, names = (json.loads(files.get(name, b"{}")) for name in HF_FILES[1:])
    if "added_tokens_decoder" in settings:
        return settings
    for key, value in names.items():
        if key == LISTS[0] and isinstance(value, list):
            value = [*(settings.get(key) or ()), *value]
        settings[key] = {**value, "special": True} if name_of(value) and value != name_of(
            value) else value
    return settings


def _named(files: Mapping[str, bytes],
           names: Mapping[str, str]) -> tuple[list[Token], list[Token]]:
    """The tokens that have a key of their own, and those of a list."""
    settings = {**names, **_settings(files)}
    more = next((settings[key] for key in LISTS if settings.get(key)), ())
    keys = [*NAMED, *(key for key in settings if key.endswith("_token") and key not in NAMED)]
    single = [settings[key] for key in keys if name_of(settings.get(key))]
    if isinstance(more, dict):
        single, more = [*single, *more.values()], ()
    return [_token(token) for token in single], [_token(token) for token in more]


def _token(given: Any) -> Token:
    """A token with all its flags, whose defaults are those of the package `tokenizers`."""
    if not isinstance(given, dict):
        given = {"content": str(given), "special": True}
    special = bool(given.get("special"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"content": given["content"], "special": special,
            **{name: bool(given.get(name, default)) for name, default in flags.items()}}


def _ids(rules: Mapping[str, Any]) -> dict[str, int]:
    vocab = rules["model"]["vocab"]
    ids = ({piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list)
           else dict(vocab))
    return ids | {token["content"]: token["id"] for token in rules["added_tokens"]}


def _check_ids(stated: Mapping[int, Token], ids: Mapping[str, int], where: str) -> None:
    new = [(i, token["content"]) for i, token in sorted(stated.items())
           if token["content"] not in ids]
    for place, (i, name) in enumerate(new, start=max(ids.values(), default=-1) + 1):
        if i != place:
            raise UserError(f"{name!r} as id {place:,}, the next one of {HF_FILES[0]}",
                            f"id {i:,} in {ADDED} or {HF_FILES[1]}",
                            "fetch the files of one version", where=where)
