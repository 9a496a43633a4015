"""Cleaning: named rules, functions from text to text, applied in the order of the config."""

from __future__ import annotations

import functools
import importlib.util
import ipaddress
import os
import re
import unicodedata
from collections.abc import Callable, Iterable

from lmjax.errors import UserError

# C0 control characters but tab and newline; DEL; byte-order mark.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ufeff]")
# Matches only where a run of spaces begins: trying every space of a long run would take quadratic
# time.
_TRAILING = re.compile(r"(?<![ \t])[ \t]+$", re.MULTILINE)
# Pieces that are composed one by one. A piece ends before a character that never composes with an
# earlier one, or after 2048 characters if there is none.
_PIECE = re.compile("(?s).{1,1024}[^\x00-\x7f\u3041-\u3096\u3400-\u9fff]{0,1024}")
_BLANK = re.compile(r"\n{4,}")
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u9fff]")
# Whole lines about the page itself: navigation, consent, sharing, rights.
_BOILERPLATE = re.compile(
    r"[ \t]*(?:(?:this (?:site|website)|we) uses? cookies.*|accept(?: all)? cookies|"
    r"cookie (?:policy|settings)|privacy policy|terms (?:of (?:use|service)|and conditions)|"
    r"(?:copyright|\(c\)|©).{0,80}all rights reserved\.?|all rights reserved\.?|"
    r"(?:share|tweet|follow us)(?: (?:this|on)\b.{0,40})?|skip to (?:main )?content|"
    r"(?:please )?(?:enable|turn on) javascript.*|(?:log|sign) ?(?:in|up|out)|"
    r"subscribe(?: to our newsletter)?|"
    r"(?:read more|click here|loading)[^\w\n]*+|back to top|advertisement|"
    r"(?:版权所有|版權所有).{0,80}|上一篇.{0,80}|下一篇.{0,80}|"
    r"点击(?:这里|查看更多)|阅读(?:全文|更多)|"
    r".{0,80}無断(?:転載|複製).{0,20}禁.{0,20}|続きを読む|"
    r"ログイン|プライバシーポリシー|利用規約)"
    r"[ \t]*(?:\n|\Z)", re.IGNORECASE)
# Every line that the pattern matches has one of these; searching for them first is far faster.
_HINTS = (
    "cookie", "privacy policy", "terms of ", "terms and conditions", "all rights reserved", "share",
    "tweet", "follow us", "skip to ", "javascript", "log in", "login", "log out", "logout",
    "log up", "logup", "sign in", "signin", "sign out", "signout", "sign up", "signup",
    "subscribe", "read more", "click here", "back to top",
    "loading", "advertisement", "版权所有", "版權所有", "上一篇", "下一篇", "点击", "阅读",
    "無断", "続きを読む", "ログイン", "プライバシーポリシー", "利用規約")
# UTF-8 that was decoded as another encoding has one of these characters.
_SUSPECT = re.compile("[\u0080-\u052f\u2010-\u2122\u2500-\u259f\ufffd]")
_SENTENCE_END = tuple(".!?\"'\u201d\u2019\u3002\uff01\uff1f\u300d\u300f\u2026")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies",
           "use cookies")
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}"
                    r"(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b")
_HOST = re.compile(r"@(?<=[A-Za-z0-9._%+-]@)[A-Za-z0-9-]")
_DOTS = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d")
_PLUS = re.compile(r"\+\d")
_IP = re.compile(r"(?<![\d.])\d{1,3}(?:\.\d{1,3}){3}(?![\d.])")
_PHONE = re.compile(r"(?<![\w+])\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,5}(?!\w)")


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _control(text: str) -> str:
    return _CONTROL.sub("", text) if _CONTROL.search(text) else text


def _nfc(text: str) -> str:
    if text.isascii():
        return text
    # In pieces, because the time of `normalize` grows with the square of the number of accents in a
    # row.
    return "".join([unicodedata.normalize("NFC", piece) for piece in _PIECE.findall(text)])


def _ftfy(text: str) -> str:
    if text.isascii() or not _SUSPECT.search(text):
        return text
    import ftfy.badness

    if not ftfy.badness.is_bad(text):
        return text
    return ftfy.fix_text(text, uncurl_quotes=False, fix_character_width=False,
                         fix_latin_ligatures=False)


def _trailing_spaces(text: str) -> str:
    found = " \n" in text or "\t\n" in text or text[-1:] in (" ", "\t")
    return _TRAILING.sub("", text) if found else text


def _blank_lines(text: str) -> str:
    return _BLANK.sub("\n\n\n", text) if "\n\n\n\n" in text else text


def _boilerplate(text: str) -> str:
    lower, starts = text.replace("\u0130", "i").lower(), set()  # U+0130 would become two characters
    for hint in _HINTS:
        at = lower.find(hint)
        while at >= 0:
            starts.add(text.rfind("\n", 0, at) + 1)
            end = text.find("\n", at)
            at = lower.find(hint, end) if end >= 0 else -1
    pieces, at = [], 0
    for found in filter(None, map(functools.partial(_BOILERPLATE.match, text), sorted(starts))):
        pieces.append(text[at : found.start()])
        at = found.end()
    return "".join([*pieces, text[at:]])


def _c4_lines(text: str) -> str:
    return "\n".join(line for line in text.split("\n") if _c4_keeps(line))


def _c4_keeps(line: str) -> bool:
    if not line.rstrip().endswith(_SENTENCE_END) or line.rstrip().endswith("..."):
        return False
    lower = line.lower()
    if "javascript" in lower or any(phrase in lower for phrase in _POLICY):
        return False
    return len(line.split()) >= 5 or len(_UNSPACED.findall(line)) >= 5


def _mask(pattern: re.Pattern[str], sign: re.Pattern[str],
          label: str | Callable[[re.Match[str]], str]) -> Callable[[str], str]:
    """A rule that replaces each match of `pattern` by `label`.

    `sign` occurs in every match. It begins with a fixed character, so searching it first is fast.
    """
    return lambda text: pattern.sub(label, text) if sign.search(text) else text


def _public_ip(found: re.Match[str]) -> str:
    try:
        return "<ip>" if ipaddress.ip_address(found.group()).is_global else found.group()
    except ValueError:
        return found.group()


# A rule that has nothing to change returns an equal text; `clean` counts changes by that.
CLEANING_RULES: dict[str, Callable[[str], str]] = {
    "newlines": _newlines,  # \r\n and \r become \n
    "control": _control,  # drops control characters, such as NUL, and byte-order marks
    "ftfy": _ftfy,  # mends text that was decoded wrongly, and changes nothing else
    "nfc": _nfc,  # gives composed and decomposed accents one spelling
    "trailing_spaces": _trailing_spaces,  # at the end of each line
    "blank_lines": _blank_lines,  # at most two in a row
    "boilerplate": _boilerplate,  # drops lines of navigation, consent, sharing and rights
    # keeps lines of 5 or more words that end like a sentence (Raffel et al., 2020)
    "c4_lines": _c4_lines,
    "mask_email": _mask(_EMAIL, _HOST, "<email>"),
    "mask_ip": _mask(_IP, _DOTS, _public_ip),  # public IPv4 addresses
    "mask_phone": _mask(_PHONE, _PLUS, "<phone>"),  # international numbers
}


def check_installed(rules: Iterable[str]) -> None:
    """Raises a UserError if one of `rules` needs a package that is not installed."""
    if "ftfy" in rules and importlib.util.find_spec("ftfy") is None:
        raise UserError("the package ftfy for the rule of that name", "none",
                        "pip install 'lmjax[clean]', or leave the rule out", where="data.clean")


def clean(text: str, rules: Iterable[str]) -> tuple[str, dict[str, tuple[str, str]]]:
    """Applies rules of the table, in their order.

    Returns:
      the text after all rules, and (before, after) for each rule that changed it, by name.
    """
    changes = {}
    for rule in rules:
        after = CLEANING_RULES[rule](text)
        if after != text:
            changes[rule] = (text, after)
            text = after
    return text, changes


def first_change(before: str, after: str, around: int = 60) -> tuple[str, str]:
    """Excerpts of two texts around the first place where they differ."""
    at = len(os.path.commonprefix([before, after]))
    low = max(0, at - around)
    return before[low : at + 4 * around], after[low : at + 4 * around]
