"""How a trained model reads a text: as ids, with those before and after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lmjax.data.config import DataConfig
from lmjax.data.objectives import Objective
from lmjax.data.rows import START_ID
from lmjax.data.tokenizers import NamedIds, Tokenizer
from lmjax.errors import UserError


class Reader(NamedTuple):
    """How texts become ids: as in the model's training, or as the imported files say."""

    names: NamedIds  # the tokenizer, with names for the ids that the objective adds
    prefix: tuple[int, ...]  # ids before a text
    suffix: tuple[int, ...]  # ids after a text
    start_id: int  # the id with which an encoder-decoder's answer begins
    end_ids: tuple[int, ...]  # each of them ends an answer
    banned_ids: tuple[int, ...] = ()  # never part of an answer

    def ids(self, text: str, room: int | None = None, *, end: bool = True) -> list[int]:
        """The ids that the model reads for a text.

        A text without any ids, prefix and suffix included, becomes a single BOS token.

        Args:
          text: the text.
          room: limit of the text's own tokens; the rest is cut.
          end: whether the suffix follows.
        """
        suffix = self.suffix if end else ()
        ids = [*self.prefix, *self.names.encode(text)[:room], *suffix]
        return ids or [self.names.tokenizer.bos_id]


def make_reader(tokenizer: Tokenizer, family: str, data: DataConfig,
                imported: Mapping[str, Any] | None) -> Reader:
    """Makes the reader of a model.

    A model that was trained here reads a whole document as its rows had it, whatever the
    tokenizer's own files put around a text.

    Args:
      tokenizer: the model's.
      family: of the model: decoder, encoder or encdec.
      data: the config of the data that it was trained on.
      imported: what a Hugging Face directory said of it (`HFModel.source`), if it is imported.
    """
    if imported:
        told = told_ids(imported, tokenizer)
        return Reader(NamedIds(tokenizer), tokenizer.prefix, tokenizer.suffix, told.start,
                      told.end, told.banned)
    objective = Objective(data.objective, seq_len=data.seq_len, vocab_size=tokenizer.vocab_size)
    bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
    prefix, suffix = {"decoder": (bos, ()), "encoder": (bos, eos), "encdec": ((), eos)}[family]
    return Reader(NamedIds(tokenizer, objective.extra), prefix, suffix, START_ID, eos)


class ToldIds(NamedTuple):
    """The ids that an imported model's files name for its answers."""

    start: int  # begins an encoder-decoder's answer
    end: tuple[int, ...]
    banned: tuple[int, ...]


def told_ids(imported: Mapping[str, Any], tokenizer: Tokenizer) -> ToldIds:
    """Reads the ids of answers from a directory's files.

    generation_config.json decides, as in transformers. config.json names what is missing there; the
    tokenizer does if neither file speaks of it.

    Args:
      imported: `HFModel.source`.
      tokenizer: that of the directory.
    """
    generation, settings = imported["generation"], imported["settings"]

    def first(*keys: str) -> Any:
        told = (part.get(key) for key in keys for part in (generation, settings))
        return next((value for value in told if value is not None), None)

    start, end = first("decoder_start_token_id", "bos_token_id"), first("eos_token_id")
    if end is None:
        end = tokenizer.eos_id
    if "eos_token_id" in generation and generation["eos_token_id"] is None:
        end = []  # as in transformers, nothing ends an answer but its length
    end = tuple(end if isinstance(end, list) else [end])
    rules = generation or settings  # transformers reads the others in one of the files
    banned = list(rules.get("suppress_tokens") or ())
    for word in rules.get("bad_words_ids") or ():
        if len(word) == 1 and word[0] not in end:
            banned += word
    return ToldIds(tokenizer.pad_id if start is None else start, end, tuple(sorted(set(banned))))


# Settings of transformers that decide tokens of an answer, and that lmjax does not follow. Without
# forced_eos_token_id an answer only has its own last token where max_tokens cuts it.
NOT_FOLLOWED = ("forced_bos_token_id", "begin_suppress_tokens", "forced_decoder_ids",
                "sequence_bias")


def check_told(imported: Mapping[str, Any]) -> None:
    """Refuses to generate where a directory's files ask for tokens that lmjax would not give.

    Args:
      imported: `HFModel.source`.

    Raises:
      UserError: forced tokens, forbidden sequences, or an id that is no number.
    """
    rules = imported["generation"] or imported["settings"]
    file = "generation_config.json" if imported["generation"] else "config.json"
    odd = {key: rules[key] for key in NOT_FOLLOWED if rules.get(key) not in (None, [], {})}
    words = [word for word in rules.get("bad_words_ids") or () if len(word) > 1]
    odd |= {"bad_words_ids": words} if words else {}
    start = rules.get("decoder_start_token_id")
    odd |= {} if isinstance(start, int | None) else {"decoder_start_token_id": start}
    if odd:
        key, value = next(iter(odd.items()))
        raise UserError(f"no {key} in {file}, which lmjax does not follow", repr(value)[:60],
                        "set it to null there to generate without it", where=file)
