"""Tokenizers of Hugging Face directories, and our SentencePiece models as such files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lmjax.data.tokenizers import HF_FILES, SPACE, HuggingFaceTokenizer, Tokenizer, tokenizer_from_bytes
from lmjax.huggingface.tensors import write_json

SENTENCEPIECE = "tokenizer.model"
# What a converted tokenizer has to split as the original does before it is written down.
PROBES = (
    "", " ", "a", " a", "a ", "  two  spaces   ", "\n", "\n\n", " \n ", "\t", "def f(x):\n    return x ** 2\n",
    "The quick brown fox jumps over the lazy dog.", "1234567890 3.14 0x7f", "naïve café — “quoted” …", "Ελληνικά",
    "Русский язык", "日本語のテキスト", "العربية", "हिन्दी", "👩‍💻 🇯🇵 e\u0301", "\x00\x07\x7f", "<s></s><unk><pad>",
    "<0x41>", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ＡＢＣ ﬁ ½", "https://example.org/a?b=c&d=%20", "\r\n",
    "\u00a0\u2003\ufeff",
)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a directory; None if it has none.

    Raises:
      ValueError: it is damaged, or the package `tokenizers` is needed and not installed.
    """
    sentencepiece = None
    if (path / SENTENCEPIECE).is_file():
        try:
            sentencepiece = tokenizer_from_bytes((path / SENTENCEPIECE).read_bytes())
        except ValueError as error:
            if not (path / HF_FILES[0]).is_file():
                raise ValueError(f"{path / SENTENCEPIECE}: {error}") from None
    # A model that adds a space in front has rules of its own, which only tokenizer.json tells.
    if (path / HF_FILES[0]).is_file() and (sentencepiece is None or _adds_space(sentencepiece)):
        return HuggingFaceTokenizer.from_directory(path)
    return sentencepiece


def write_tokenizer(path: Path, tokenizer: Tokenizer, *, log: Callable[[str], None] = print) -> None:
    """Writes the files that a tokenizer came with, or tokenizer.model and, if it says the same, tokenizer.json."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        for name, text in tokenizer.files.items():
            (path / name).write_text(text, encoding="utf-8")
        return
    (path / SENTENCEPIECE).write_bytes(tokenizer.to_bytes())
    try:
        converted, why = _converted(tokenizer)
    except ImportError:
        converted, why = None, "the package tokenizers is not installed: pip install lmjax[hf]"
    if converted is None:
        log(f"tokenizer.json is left out, use tokenizer.model: {why}")
        return
    converted.save(str(path / HF_FILES[0]))
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    write_json(path / HF_FILES[1], {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        **{key: converted.id_to_token(i) for key, i in names.items()}})
    log(f"tokenizer.json splits {len(PROBES)} probes as tokenizer.model does; it alone reads U+2581 as a space")


def _converted(tokenizer: Tokenizer) -> tuple[Any, str]:
    """(tokenizers.Tokenizer, "") if it splits every probe as `tokenizer` does, else (None, why)."""
    import tokenizers
    from tokenizers import AddedToken, decoders, normalizers, processors

    if _adds_space(tokenizer):
        return None, "its model adds a space in front of a text"
    pieces = _pieces(tokenizer)
    out = tokenizers.Tokenizer(_model(pieces))
    out.normalizer = normalizers.Replace(" ", SPACE)
    out.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    control = [piece.text for piece in pieces if piece.kind == "control"]
    out.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    # No piece spans lines. SentencePiece does not tell a user's symbols apart; those of lmjax are newlines.
    out.add_tokens([AddedToken(piece.text, normalized=False) for piece in pieces if piece.text == "\n"])
    bos = out.id_to_token(tokenizer.bos_id)
    out.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    for text in PROBES:
        # A control token's name in a text is that token there and plain text here.
        if not any(name in text for name in control):
            expected, got = tokenizer.encode(text), out.encode(text, add_special_tokens=False).ids
            if expected != got:
                return None, f"it would split {text!r} into {got}, not {expected}"
    return out, ""


class _Piece(NamedTuple):
    text: str
    score: float
    kind: str


def _pieces(tokenizer: Tokenizer) -> list[_Piece]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.to_bytes())
    asked = {"control": sp.is_control, "unknown": sp.is_unknown, "byte": sp.is_byte}
    kinds = (next((kind for kind, ask in asked.items() if ask(i)), "normal") for i in range(sp.vocab_size()))
    return [_Piece(sp.id_to_piece(i), sp.get_score(i), kind) for i, kind in enumerate(kinds)]


def _adds_space(tokenizer: Tokenizer) -> bool:
    return tokenizer.decode(tokenizer.encode("a")) != "a"


def _model(pieces: Sequence[_Piece]) -> Any:
    from tokenizers import models

    unknown = next(i for i, piece in enumerate(pieces) if piece.kind == "unknown")
    normal = [piece for piece in pieces if piece.kind == "normal"]
    if any(piece.score != int(piece.score) for piece in normal):  # log-likelihoods; those of a BPE model count merges
        return models.Unigram([(piece.text, piece.score) for piece in pieces], unk_id=unknown, byte_fallback=True)
    ids = {piece.text: i for i, piece in enumerate(pieces)}
    # SentencePiece joins the neighbours whose union has the best score; a rank for each way to that union.
    merges = [(-score, ids[text[:cut]], ids[text[cut:]], text[:cut], text[cut:])
              for text, score, _ in normal for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
    return models.BPE(ids, [(a, b) for *_, a, b in sorted(merges)], unk_token=pieces[unknown].text, byte_fallback=True)
