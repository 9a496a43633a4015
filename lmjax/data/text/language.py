"""Which language a text is in, by its script or, where languages share it, by function words.

A language's most frequent small words make up a third of running text, and few of them belong to
two languages; a word of n languages counts 1 / n for each. A text with too few of them is `und`
(undetermined), as code and tables should be.

Shape legend: C characters, W words, D texts (D1: D + 1 bounds), S scripts, H different function
words, L languages.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from lmjax.data.text.words import Words, split

UNDETERMINED = "und"
# A text is in a language if at least MIN_SHARE of its words are function words of that language (a
# word of n languages counts 1 / n), and at least MIN_HITS are function words of any language.
# Running text has a share of 0.2 to 0.5.
MIN_SHARE, MIN_HITS = 0.08, 3
# Script -> ranges of code points (first, last). A script that stands for one language has that
# language's code as its name. Any other character is taken to be Latin or no letter.
_SCRIPTS = {
    "kana": ((0x3040, 0x30FF),),
    "han": ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
    "ko": ((0xAC00, 0xD7AF), (0x1100, 0x11FF)),
    "el": ((0x0370, 0x03FF),),
    "cyrillic": ((0x0400, 0x04FF),),
    "he": ((0x0590, 0x05FF),),
    "arabic": ((0x0600, 0x06FF),),
    "hi": ((0x0900, 0x097F),),
    "th": ((0x0E00, 0x0E7F),),
}
FUNCTION_WORDS = {
    "en": "the of and to in is that for it with as be on by this are at from or have not you "
          "which an was can will has",
    "de": "der die das und ist nicht ein eine mit von zu den auf für im sich dem auch als "
          "werden oder wird sind aus",
    "fr": "le la les de des et est dans un une pour que qui pas sur au avec ce sont par il plus "
          "ou cette du vous",
    "es": "el la los las de y que en un una es por con para no se del al como su más está puede "
          "este o son",
    "it": "il la le di e che è per un una in non con del della sono si da come nel più i gli "
          "alla dei questo",
    "pt": "o a os as de e que em um uma é para com não por se do da no na mais como foi ao dos "
          "são pode",
    "nl": "de het een en van is niet dat op te met voor zijn in er aan door ook als bij naar "
          "kan wordt of deze",
    "sv": "och att det som en är av för på med till den inte har om ett kan från eller detta "
          "var så",
    "da": "og at det som en er af for på med til den ikke har om et kan fra eller dette var der "
          "til blev",
    "fi": "ja on ei se että ovat mutta kun niin myös tai joka sen tämä voi olla hän oli kuin jos",
    "pl": "i w na z do nie jest się że to o jak dla po od przez lub oraz są ale czy może za "
          "jego tym",
    "cs": "a v na je se že s z do pro o to jako i ale nebo by jsou po k může které při tak od",
    "hu": "a az és hogy nem egy is ez van vagy meg csak de ha mint minden volt lehet ki el két "
          "kell már",
    "ro": "și de la cu în nu este pe un o care din mai sau pentru sunt să se fi ce ca al prin "
          "acest",
    "tr": "ve bir bu için ile da de olarak ne gibi olan daha çok var veya ama en sonra kadar "
          "her ise değil",
    "vi": "và của là có cho không được các một trong với này để những khi đã từ nếu người",
    "id": "yang dan di ini untuk dengan tidak dari dalam akan pada atau juga ke adalah oleh itu "
          "dapat telah bisa",
    "ru": "и в не на что с как это для по из от или к о так его был но при он я этот",
    "uk": "і в не на що з як це для та або від до його є про за так цей у",
}
CYRILLIC = ("ru", "uk")


@functools.cache
def _scripts() -> np.ndarray:
    """Number of every code point's script in `_SCRIPTS`, from 1; 0: none. uint8 [0x110000]."""
    table = np.zeros(0x110000, np.uint8)
    for number, ranges in enumerate(_SCRIPTS.values(), 1):
        for first, last in ranges:
            table[first : last + 1] = number
    return table


@functools.cache
def _function_words() -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all function words, sorted uint64 [H], and their weights per language, [H, L]."""
    hashes = []
    for words in FUNCTION_WORDS.values():
        # A single ASCII letter is often the name of a variable, so it is no function word here.
        kept = " ".join(w for w in words.split() if len(w) > 1 or not w.isascii())
        hashes.append(np.unique(split([kept]).hash_W))
    hash_H = np.unique(np.concatenate(hashes))
    mine_HL = np.stack([np.isin(hash_H, own) for own in hashes], axis=1).astype(float)
    return hash_H, mine_HL / mine_HL.sum(axis=1, keepdims=True)


def identify(words: Words) -> list[str]:
    """The ISO 639-1 code of each text, or `und`.

    Args:
      words: the words of the texts, `words.split(texts)`.
    """
    documents = len(words.offset_D)
    script_C = _scripts()[words.codes_C]
    found = np.flatnonzero(script_C)
    doc = np.searchsorted(words.offset_D, found, side="right") - 1
    S = len(_SCRIPTS)
    count_DS = np.bincount(doc * S + script_C[found] - 1,
                           minlength=documents * S).reshape(documents, S)
    letters_D = np.bincount(words.doc_W, words.end_W - words.start_W, documents)
    hash_H, weight_HL = _function_words()
    at = np.minimum(np.searchsorted(hash_H, words.hash_W), len(hash_H) - 1)
    hits = np.flatnonzero(hash_H[at] == words.hash_W)
    score_DL = np.stack([np.bincount(words.doc_W[hits], w[at[hits]], documents)
                         for w in weight_HL.T], axis=1)
    words_D = np.maximum(np.diff(words.bounds_D1), 1)
    hits_D = np.bincount(words.doc_W[hits], minlength=documents)
    facts = zip(count_DS, letters_D, score_DL, words_D, hits_D, strict=True)
    return [_decide(*row) for row in facts]


def _decide(count_S: np.ndarray, letters: float, score_L: np.ndarray, words: int, hits: int) -> str:
    """The language of one text.

    Args:
      count_S: characters in each script, in the order of `_SCRIPTS`.
      letters: letters and digits of all scripts.
      score_L: weighted function words of each language.
      words: number of words, at least 1.
      hits: number of function words of any language.
    """
    count = dict(zip(_SCRIPTS, count_S.tolist(), strict=True))
    # A character of Chinese or Japanese says as much as 2 or 3 Latin letters: a share of 0.3 is
    # enough, where other scripts need 0.5.
    east = count["kana"] + count["han"]
    if east > 0.3 * letters:
        return "ja" if count["kana"] > 0.1 * east else "zh"
    best = max([name for name in _SCRIPTS if name not in ("kana", "han")], key=count.__getitem__)
    languages: Sequence[str] = list(FUNCTION_WORDS)
    if count[best] > 0.5 * letters:
        if best == "arabic":
            return "ar"
        if best != "cyrillic":
            return best
        languages = CYRILLIC
    score, language = max((score_L[list(FUNCTION_WORDS).index(name)], name) for name in languages)
    return language if hits >= MIN_HITS and score >= MIN_SHARE * words else UNDETERMINED
