"""Tokenizers as files of a Hugging Face directory, SentencePiece models converted for it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.data.tokenizers import HF_FILES, SPACE, SentencePieceTokenizer, Tokenizer
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


def write_tokenizer(path: Path, tokenizer: Tokenizer, *,
                    log: Callable[[str], None] = print) -> None:
    """Writes a tokenizer into a directory.

    An imported tokenizer is written as it was read, with the other files of its directory. A
    SentencePiece model of ours becomes tokenizer.model, and also tokenizer.json if that splits all
    of `PROBES` the same way.
    """
    for name, raw in tokenizer.files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return
    (path / SENTENCEPIECE).write_bytes(tokenizer.model)
    if tokenizer.files:
        return
    try:
        converted, why = _converted(tokenizer)
    except ImportError:
        converted = None
        why = "the package tokenizers is not installed: pip install lmjax[hf]"
    if converted is None:
        log(f"tokenizer.json is left out, use tokenizer.model: {why}")
        return
    converted.save(str(path / HF_FILES[0]))
    write_json(path / HF_FILES[1], {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": converted.id_to_token(tokenizer.bos_id),
        "eos_token": converted.id_to_token(tokenizer.eos_id)})
    log(f"tokenizer.json splits {len(PROBES)} probes as tokenizer.model does; only tokenizer.json "
        "reads U+2581 as a space")


def _converted(tokenizer: SentencePieceTokenizer) -> tuple[Any, str]:
    """Converts a SentencePiece model to a `tokenizers.Tokenizer`.

    Returns (converted, "") if the converted one splits every probe as `tokenizer` does, and
    (None, reason) otherwise.
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, normalizers, processors

    if adds_space(tokenizer):
        return None, "its model adds a space before a text"
    pieces = _pieces(tokenizer)
    out = tokenizers.Tokenizer(_model(pieces))
    out.normalizer = normalizers.Replace(" ", SPACE)
    out.decoder = decoders.Sequence([
        decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [piece.text for piece in pieces if piece.kind == "control"]
    out.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    # SentencePiece does not say which pieces are user symbols. lmjax's models have one: the
    # newline, so that no piece spans lines.
    out.add_tokens([
        AddedToken(piece.text, normalized=False) for piece in pieces if piece.text == "\n"])
    bos = out.id_to_token(tokenizer.bos_id)
    out.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
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
