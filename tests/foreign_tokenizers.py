"""Tokenizers like those of published models, made of a small corpus; they need transformers."""

COUNT = 20
SENTINELS = [f"<extra_id_{i}>" for i in range(COUNT)]
CORPUS = [f"Document {i} tells of the number {i * i}, and thanks you for your visit.\n" * 3
          for i in range(60)]


def _unigram(pieces):
    """A T5-like tokenizer: the pieces, then words with a space before them, and letters."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    words = sorted({f"▁{word}" for text in CORPUS for word in text.split()})
    letters = sorted({c for text in CORPUS for c in text if c.strip()} | set("▁<>_0123456789"))
    vocab = [(piece, 0.0) for piece in pieces]
    vocab += [(piece, -2.0 - i / 100) for i, piece in enumerate([*words, *letters])]
    made = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    made.decoder = decoders.Metaspace()
    return made


def _save(folder, made, added, template, **roles):
    import transformers
    from tokenizers import AddedToken, processors

    folder.mkdir()
    made.add_special_tokens([AddedToken(name, normalized=False, lstrip=name == "<mask>")
                             for name in added])
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[
        (name, made.token_to_id(name)) for name in template.split() if name != "$A"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{key}_token": name for key, name in roles.items()},
    ).save_pretrained(folder)
    return folder


def t5(folder, *, extra=()):
    """As T5's: <extra_id_0> is the last id."""
    made = _unigram(["<pad>", "</s>", "<unk>"])
    return _save(folder, made, ["<pad>", "</s>", "<unk>", *extra, *reversed(SENTINELS)],
                 "$A </s>", eos="</s>", pad="<pad>", unk="<unk>")


def ul2(folder):
    """The modes are added tokens, one of which is also a word."""
    return t5(folder, extra=["[NLU]", "[S2S]", "[NLG]"])


def mt5(folder):
    """As mT5's: the sentinels are pieces with the sign for a space, and no added tokens."""
    made = _unigram(["<pad>", "</s>", "<unk>", *(f"▁{name}" for name in reversed(SENTINELS))])
    return _save(folder, made, ["<pad>", "</s>", "<unk>"], "$A </s>", eos="</s>", pad="<pad>",
                 unk="<unk>")


def bert(folder, *, mask="[MASK]", named=True):
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", mask]
    letters = sorted({c.lower() for text in CORPUS for c in text if c.strip()})
    pieces = [*special, *letters, *(f"##{c}" for c in letters)]
    made = tokenizers.Tokenizer(models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return _save(folder, made, special, "[CLS] $A [SEP]", cls="[CLS]", sep="[SEP]", pad="[PAD]",
                 unk="[UNK]", **({"mask": mask} if named else {}))


def unnamed(folder):
    """No file says which token is the mask."""
    return bert(folder, named=False)


def other_name(folder):
    return bert(folder, mask="<|hidden|>")


def roberta(folder):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*special, *letters, "<mask>"]
    made = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _save(folder, made, [*special, "<mask>"], "<s> $A </s>", bos="<s>", eos="</s>",
                 cls="<s>", sep="</s>", pad="<pad>", unk="<unk>", mask="<mask>")
