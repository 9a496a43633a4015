"""How a trained model reads a text: as ids, with those before and after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lmjax.data.config import DataConfig
from lmjax.data.objectives import mark_ids
from lmjax.data.rows import START_ID
from lmjax.data.tokenizers import NamedIds, Tokenizer
from lmjax.errors import UserError


class Reader(NamedTuple):
    """How texts become ids: as in the model's training, or as the imported files say."""

    names: NamedIds  # the tokenizer, with names for the ids that the objective uses
    prefix: tuple[int, ...]  # ids before a text
    suffix: tuple[int, ...]  # ids after a text
    start_id: int  # the id with which an encoder-decoder's answer begins
    end_ids: tuple[int, ...]  # each of them ends an answer
    banned_ids: tuple[int, ...] = ()  # never part of an answer
    middle: tuple[int, ...] = ()  # ids between two texts
    second_type: int = 0  # the kind of segment of a second text's tokens
    causal: bool = False  # whether a token sees only those before it

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
                about: Mapping[str, Any], *, rows: int = 0) -> Reader:
    """Makes the reader of a model.

    A model that was trained here reads a whole document as its rows had it, whatever the
    tokenizer's own files put around a text. One whose weights were imported keeps what its files
    say, and if it was trained on here, knows the names of the ids that its rows had.

    Args:
      tokenizer: the model's.
      family: of the model: decoder, encoder or encdec.
      data: the config of the data that it was trained on.
      about: what its checkpoint says. `huggingface` is there if the weights were imported
        (`HFModel.source`), and `init_from` as well if a run started from them.
      rows: of the model's table. An id without a row has no name: a model that was only trained
        on a task has none for the mask of an objective. 0: every id has one.
    """
    own, new = mark_ids(data.objective, tokenizer.vocab_size, tokenizer)
    ids = {name: i for name, i in (own | new).items() if not rows or i < rows}
    causal = family == "decoder"
    if "huggingface" in about:
        told = told_ids(about["huggingface"], tokenizer)
        names = NamedIds(tokenizer, ids if "init_from" in about else None)
        return Reader(names, tokenizer.prefix, tokenizer.suffix, told.start, told.end, told.banned,
                      tokenizer.middle, tokenizer.second_type, causal)
    bos, eos = (tokenizer.bos_id,), (tokenizer.eos_id,)
    prefix, suffix = {"decoder": (bos, ()), "encoder": (bos, eos), "encdec": ((), eos)}[family]
    return Reader(NamedIds(tokenizer, ids), prefix, suffix, START_ID, eos, (), eos, 1,
                  causal)


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

    Raises:
      UserError: an id that ends an answer or is banned from it is no number.
    """
    _check_types(imported)
    generation, settings = imported["generation"], imported["settings"]
    start, end = told_start(imported), _told(imported, "eos_token_id")
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


def told_start(imported: Mapping[str, Any]) -> Any:
    """The id with which a directory's files begin an answer; None if they name none."""
    return _told(imported, "decoder_start_token_id", "bos_token_id")


def _told(imported: Mapping[str, Any], *keys: str) -> Any:
    """The first of these settings that the files of a directory have."""
    told = (imported[part].get(key) for key in keys for part in ("generation", "settings"))
    return next((value for value in told if value is not None), None)


# Settings of transformers that decide tokens of an answer, and that lmjax does not follow, with the
# values that decide nothing. Without forced_eos_token_id an answer only has its own last token
# where max_tokens cuts it. How tokens are drawn (temperature, beams) is the caller's choice.
NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "forced_bos_token_id": (), "begin_suppress_tokens": ([],), "forced_decoder_ids": ([],),
    "sequence_bias": ({}, []), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,), "min_new_tokens": (0,), "exponential_decay_length_penalty": (),
    "encoder_repetition_penalty": (1.0,), "guidance_scale": (1.0,), "watermarking_config": ({},),
    "stop_strings": ([], "")}


def check_told(imported: Mapping[str, Any]) -> None:
    """Refuses to generate where a directory's files ask for tokens that lmjax would not give.

    Args:
      imported: `HFModel.source`.

    Raises:
      UserError: forced tokens, forbidden sequences, a least length, or a start that is no number.
    """
    rules = imported["generation"] or imported["settings"]
    file = "generation_config.json" if imported["generation"] else "config.json"
    odd = {key: rules[key] for key, values in NOT_FOLLOWED.items()
           if rules.get(key) is not None and rules[key] not in values}
    words = [word for word in rules.get("bad_words_ids") or () if len(word) > 1]
    odd |= {"bad_words_ids": words} if words else {}
    odd |= {key: rules[key] for key in ("decoder_start_token_id", "bos_token_id")
            if not _is_id(rules.get(key, 0) or 0)}
    if odd:
        key, value = next(iter(odd.items()))
        raise UserError(f"no {key} in {file}, which lmjax does not follow", repr(value)[:60],
                        "set it to null there to generate without it", where=file)


def _check_types(imported: Mapping[str, Any]) -> None:
    """Refuses ids of answers that are of another type than transformers writes."""
    for file, rules in (("generation_config.json", imported["generation"]),
                        ("config.json", imported["settings"])):
        ends, banned, words = (rules.get(key) for key in (
            "eos_token_id", "suppress_tokens", "bad_words_ids"))
        for key, value, wanted, right in (
                ("eos_token_id", ends, "an id or a list of ids", _is_id(ends) or _are_ids(ends)),
                ("suppress_tokens", banned, "a list of ids", _are_ids(banned)),
                ("bad_words_ids", words, "a list of lists of ids",
                 isinstance(words, list) and all(map(_are_ids, words)))):
            if value is not None and not right:
                raise UserError(wanted, f"{key}={value!r:.60}", "correct it, or set it to null",
                                where=file)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(values: Any) -> bool:
    return isinstance(values, list) and all(map(_is_id, values))
