"""Byte-level BPE as GGUF files hold it: tokens, merges, and the name of a splitting rule."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lmjax.errors import UserError

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",)
_QWEN2 = (_LLAMA3[0].replace("{1,3}", ""),)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
           r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",)


class Split(NamedTuple):
    """How a text becomes the words in which tokens are merged."""

    patterns: tuple[str, ...]  # regular expressions, one after the other, of words
    whole_words: bool = False  # a word that is a token is not merged from smaller ones
    bos: bool = False  # a text begins with the token BOS, unless the file says otherwise


# By llama.cpp's name. The first of those that split alike is the one that is written.
SPLITS = {
    **dict.fromkeys(("gpt-2", "phi-2", "modern-bert", "mellum", "exaone4", "mpt", "olmo", "jais",
                     "trillion", "granite-docling"), Split(_GPT2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone",
                     "minerva-7b"), Split(_DIGITS)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"),
                    Split(_LLAMA3, whole_words=True, bos=True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"),
                    Split(_QWEN2)),
    "tekken": Split(_TEKKEN, whole_words=True, bos=True),
}


def byte_level(tokens: Sequence[str], merges: Sequence[str], kinds: Sequence[int] | None,
               name: str, where: str = "", bos: str | None = None,
               add_bos: bool | None = None) -> Any:
    """A tokenizer of the package `tokenizers`.

    Args:
      tokens: by id.
      merges: of two tokens each, with a space between them, the most frequent first.
      kinds: of the tokens, as GGUF numbers them; None: all are normal.
      name: of a row of SPLITS.
      where: the file, for messages.
      bos: the token BOS, if there is one.
      add_bos: whether a text begins with it; None: as the row says.

    Raises:
      UserError: no row has this name.
    """
    import tokenizers
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

    if name not in SPLITS:
        raise UserError(f"a tokenizer that splits texts as one of {', '.join(SPLITS)}", repr(name),
                        "use the model's Hugging Face directory", where=where)
    split = SPLITS[name]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in merges)]
    made = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=split.whole_words))
    made.pre_tokenizer = pre_tokenizers.Sequence([
        *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split.patterns),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds or [1] * len(tokens), strict=True):
        if kind in (3, 4):  # control, user-defined
            made.add_tokens([AddedToken(token, special=kind == 3, normalized=False)])
    if bos is not None and (split.bos if add_bos is None else add_bos):
        made.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"],
            special_tokens=[(bos, vocabulary[bos])])
    return made
