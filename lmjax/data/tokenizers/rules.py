"""Changes to the rules of a tokenizer.json: ids that a model does not have, names in documents."""

from __future__ import annotations

from typing import Any

HIDDEN = "\uffff"  # Unicode's "not a character": no text has it


def drop_rows(rules: dict[str, Any], rows: int) -> dict[str, Any]:
    """Returns rules without the ids from `rows` on: no text becomes them, and none has a name."""
    model = dict(rules["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = model["vocab"][:rows]
    else:
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < rows}
    if "merges" in model:
        # Pairs that no longer make up a piece. A pair is a list, in older files "a b".
        sign = model.get("continuing_subword_prefix") or ""
        pairs = [(merge, merge.split(" ", 1) if isinstance(merge, str) else merge)
                 for merge in model["merges"]]
        model["merges"] = [merge for merge, (a, b) in pairs
                           if {a, b, a + b.removeprefix(sign)} <= model["vocab"].keys()]
    added = [token for token in rules["added_tokens"] if token["id"] < rows]
    return {**rules, "model": model, "added_tokens": added}


def hide_names(rules: dict[str, Any]) -> dict[str, Any]:
    """Returns rules that read the names of special tokens as plain text, with the same ids.

    `Tokenizer.encode_special_tokens` is not enough where the names are pieces of the vocabulary
    too, as in Unigram models. A BPE model reaches a piece by its merges, and none leads to a name.
    """
    names = {token["content"] for token in rules["added_tokens"] if token["special"]}
    model = dict(rules["model"])
    if "merges" in model:
        return rules

    def hidden(piece: Any) -> Any:
        return f"{HIDDEN}{piece}{HIDDEN}" if piece in names else piece

    if isinstance(model["vocab"], list):
        model["vocab"] = [[hidden(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {hidden(piece): i for piece, i in model["vocab"].items()}
    if "unk_token" in model:
        model["unk_token"] = hidden(model["unk_token"])
    added = [{**token, "content": hidden(token["content"])} for token in rules["added_tokens"]]
    return {**rules, "model": model, "added_tokens": added, "post_processor": None}
