"""Tokenizers of the kinds that published models have, small, made with the package `tokenizers`."""

import json

SPECIAL = ["<s>", "</s>", "<unk>", "[MASK]", "<|endoftext|>"]
TEXTS = [f"The cat {i} sat on the mat.\nA dog ran." for i in range(12)]
NAMES = ["".join(("a ", name, " b", name, "c")) for name in SPECIAL]


def save(folder, made, **settings):
    """Writes tokenizer.json and a tokenizer_config.json."""
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", **settings}))
    return folder


def _bytes(extra=()):
    return {piece: i for i, piece in enumerate(
        [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *extra])}


def llama(folder):
    """As Llama 2's and Mistral's: a space is put before a text and taken away again."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    made = tokenizers.Tokenizer(models.BPE(
        _bytes(["▁", *map(chr, range(33, 127)), "▁T", "▁c"]), [("▁", "T"), ("▁", "c")],
        unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)])
    return save(folder, made)


def unigram(folder):
    """As T5's: the names of the special tokens are pieces of the vocabulary."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [*SPECIAL, "▁", *map(chr, range(33, 127)), "\n"]
    made = tokenizers.Tokenizer(models.Unigram(
        [(piece, 0.0 if piece in SPECIAL else -5.0) for piece in pieces], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(SPECIAL)
    return save(folder, made)


def word_piece(folder):
    """As BERT's: lower case, and white space is lost."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([*TEXTS, *NAMES], trainers.WordPieceTrainer(
        vocab_size=90, special_tokens=["[UNK]", "[CLS]", "[SEP]", *SPECIAL], show_progress=False))
    return save(folder, made, bos_token=None, eos_token=None, cls_token="[CLS]",
                 sep_token="[SEP]")


def byte_level(folder):
    """As GPT-2's."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(
        vocab_size=280, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return save(folder, made)
