"""Tokenizers as files of a Hugging Face directory, SentencePiece models converted for it."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lmjax.data.chat import FILE
from lmjax.data.objectives import MASK
from lmjax.data.reading import Reader
from lmjax.data.tokenizers import (
    HF_FILES,
    SPACE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    tokenizer_settings,
)
from lmjax.huggingface.added import ADDED
from lmjax.huggingface.tensors import write_json
from lmjax.huggingface.tokenizers import SENTENCEPIECE, adds_space

# A converted tokenizer is written only if it splits all of these as the original does.
PROBES = (
    "", " ", "a", " a", "a ", "  two  spaces   ", "\n", "\n\n", " \n ", "\t",
    "def f(x):\n    return x ** 2\n", "The quick brown fox jumps over the lazy dog.",
    "1234567890 3.14 0x7f", "naïve café — “quoted” …", "Ελληνικά", "Русский язык",
    "日本語のテキスト", "العربية", "हिन्दी", "👩‍💻 🇯🇵 e\u0301", "\x00\x07\x7f",
    "<s></s><unk><pad>", "<0x41>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ＡＢＣ ﬁ ½",
    "https://example.org/a?b=c&d=%20", "\r\n", "\u00a0\u2003\ufeff",
)


def write_tokenizer(path: Path, reader: Reader, *, generates: bool = True, types: bool = False,
                    log: Callable[[str], None] = print) -> None:
    """Writes a tokenizer into a directory, so that it reads a text as the model does.

    An imported tokenizer is written as it was read, with the other files of its directory, if that
    says what the model reads. A SentencePiece model of ours becomes tokenizer.model, and also
    tokenizer.json if that splits all of `PROBES` the same way.

    Args:
      path: the directory.
      reader: the tokenizer, the ids around a text, and names of the objective's ids.
      generates: whether the model continues a text, so that padding must stand before it.
      types: whether the model tells the tokens of a second text from those of the first.
      log: prints a line for the user.
    """
    tokenizer = reader.names.tokenizer
    for name, raw in tokenizer.files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
    if isinstance(tokenizer, SentencePieceTokenizer):
        (path / SENTENCEPIECE).write_bytes(tokenizer.model)
    as_told = not reader.names.new and (
        (reader.prefix, reader.suffix) == (tokenizer.prefix, tokenizer.suffix))
    imported = set(tokenizer.files) - {FILE}  # a chat template may be ours
    if imported and as_told:
        return
    try:
        made, why = rules_of(tokenizer)
    except ImportError:
        made, why = None, "the package tokenizers is not installed: pip install lmjax[hf]"
    if made is None:
        log(f"tokenizer.json is left out, use tokenizer.model: {why}")
        if not as_told:
            _tell_ends(path, reader, log)
        return
    _put_around(made, reader, log)
    made.save(str(path / HF_FILES[0]))
    names = ["input_ids", *["token_type_ids"] * types, "attention_mask"]
    write_json(path / HF_FILES[1], {**_described(made, reader, generates),
                                    "model_input_names": names})
    for name in (HF_FILES[2], ADDED):  # the two files above say all of it
        (path / name).unlink(missing_ok=True)
    if not imported:
        log(f"tokenizer.json splits {len(PROBES)} probes as tokenizer.model does; only "
            "tokenizer.json reads U+2581 as a space")


def pad_of(tokenizer: Tokenizer) -> int:
    """The id that pads batches outside: the tokenizer's, or EOS if that id stands for text."""
    is_text = tokenizer.surface(np.array([tokenizer.pad_id]))[0]
    return tokenizer.eos_id if is_text else tokenizer.pad_id


def mask_of(reader: Reader) -> str | None:
    """The name of the mask among the objective's ids."""
    names = (reader.names.tokenizer.mask_name, MASK)
    return next((name for name in names if name in reader.names.ids), None)


def rules_of(tokenizer: Tokenizer) -> tuple[Any, str]:
    """The tokenizer as a `tokenizers.Tokenizer`, or (None, reason)."""
    import tokenizers

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizers.Tokenizer.from_str(tokenizer.to_json()), ""
    assert isinstance(tokenizer, SentencePieceTokenizer)
    if HF_FILES[0] in tokenizer.files:
        return tokenizers.Tokenizer.from_str(tokenizer.files[HF_FILES[0]].decode()), ""
    return _converted(tokenizer)


def _put_around(made: Any, reader: Reader, log: Callable[[str], None]) -> None:
    """Gives `made` the names of the objective's ids, and the ids before and after a text."""
    from tokenizers import AddedToken, processors

    known, mask = made.get_added_tokens_decoder(), mask_of(reader)
    for i, name in sorted((i, name) for name, i in reader.names.ids.items()):
        found = made.token_to_id(name)
        is_new = found is None and i >= reader.names.tokenizer.vocab_size
        # A piece of the vocabulary is found anywhere in a text only if it is an added token.
        if is_new or (found == i and i not in known):
            # transformers drops special tokens from an answer; lmjax writes sentinels and modes.
            made.add_tokens([AddedToken(name, special=name == mask, normalized=False)])
        if i not in made.encode(f"a {name}", add_special_tokens=False).ids:
            read = "text" if found is None else f"id {found}, which it had before"
            log(f"tokenizer.json reads {name} as {read}; the model was trained with {i}: give the "
                "model ids, not this name")
    ends = {i: made.id_to_token(i) for i in (*reader.prefix, *reader.middle, *reader.suffix)}
    before, between, after = ([ends[i] for i in part] for part in (
        reader.prefix, reader.middle, reader.suffix))
    second = [f"{piece}:{reader.second_type}" for piece in ("$B", *after)]
    made.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after], pair=[*before, "$A", *between, *second],
        special_tokens=[(name, i) for i, name in ends.items()])


def _described(made: Any, reader: Reader, generates: bool) -> dict[str, Any]:
    """tokenizer_config.json: which tokens are special, and how batches are padded."""
    tokenizer = reader.names.tokenizer
    kept = {key: value for key, value in tokenizer_settings(tokenizer.files).items()
            if key not in ("added_tokens_decoder", "add_bos_token", "add_eos_token", "extra_ids")}
    model = json.loads(made.to_str())["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    roles = {"bos_token": made.id_to_token(tokenizer.bos_id),
             "eos_token": made.id_to_token(tokenizer.eos_id),
             "pad_token": made.id_to_token(pad_of(tokenizer))}
    roles |= {"unk_token": unknown} if unknown else {}
    roles |= {"mask_token": mask} if (mask := mask_of(reader)) else {}
    return {**kept, **roles, "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "padding_side": "left" if generates else "right"}


def _tell_ends(path: Path, reader: Reader, log: Callable[[str], None]) -> None:
    """Says beside a lone tokenizer.model what stands around a text; names have no place there."""
    settings = tokenizer_settings(reader.names.tokenizer.files)
    write_json(path / HF_FILES[1], settings | {
        "add_bos_token": bool(reader.prefix), "add_eos_token": bool(reader.suffix)})
    if names := reader.names.new:
        log(f"tokenizer.model has no names for the {len(names)} ids of the objective ({names[0]} "
            f"is {reader.names.tokenizer.vocab_size}): give the model ids in place of names")


def _converted(tokenizer: SentencePieceTokenizer) -> tuple[Any, str]:
    """Converts a SentencePiece model to a `tokenizers.Tokenizer`.

    Returns (converted, "") if the converted one splits every probe as `tokenizer` does, and
    (None, reason) otherwise.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, normalizers

    if adds_space(tokenizer):
        return None, "its model adds a space before a text"
    pieces = _pieces(tokenizer)
    out = tokenizers.Tokenizer(_model(pieces))
    out.normalizer = normalizers.Replace(" ", SPACE)
    out.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # transformers reads the name of the unknown token as that token, as those of control tokens.
    control = [piece.text for piece in pieces if piece.kind in ("control", "unknown")]
    out.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    # SentencePiece does not say which pieces are user symbols. lmjax's models have one: the
    # newline, so that no piece spans lines.
    out.add_tokens([
        AddedToken(piece.text, normalized=False) for piece in pieces if piece.text == "\n"])
    for text in PROBES:
        # `tokenizers` reads the name of a control token as that token, lmjax as plain text.
        if not any(name in text for name in control):
            expected, got = tokenizer.encode(text), out.encode(text, add_special_tokens=False).ids
            if expected != got:
                return None, f"it would split {text!r} into {got}, not {expected}"
    return out, ""


class _Piece(NamedTuple):
    text: str
    score: float
    kind: str  # control, unknown, byte or normal


def _pieces(tokenizer: SentencePieceTokenizer) -> list[_Piece]:
    """The vocabulary of a SentencePiece model, in the order of its ids."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    tests = {"control": model.is_control, "unknown": model.is_unknown, "byte": model.is_byte}
    return [_Piece(model.id_to_piece(i), model.get_score(i),
                   next((kind for kind, test in tests.items() if test(i)), "normal"))
            for i in range(model.vocab_size())]


def _model(pieces: Sequence[_Piece]) -> Any:
    """The unigram or BPE model of `tokenizers` with these pieces."""
    from tokenizers import models

    unknown = next(i for i, piece in enumerate(pieces) if piece.kind == "unknown")
    normal = [piece for piece in pieces if piece.kind == "normal"]
    # Unigram scores are log-likelihoods; BPE scores are whole numbers, which count merges.
    if any(piece.score != int(piece.score) for piece in normal):
        return models.Unigram([(piece.text, piece.score) for piece in pieces],
                              unk_id=unknown, byte_fallback=True)
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    # SentencePiece merges the two neighbours whose union has the best score. `tokenizers` ranks
    # pairs instead, so every pair that makes up a piece gets the rank of that piece.
    merges = [(-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
              for text, score, _ in normal for cut in range(1, len(text))
              if text[:cut] in ids and text[cut:] in ids]
    return models.BPE(ids, [(a, b) for *_, a, b in sorted(merges)],
                      unk_token=pieces[unknown].text, byte_fallback=True)
