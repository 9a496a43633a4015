"""Paths as users write them: `~`, variables, `file://` and buckets, expanded here and nowhere else.

A path is a local one, or a directory of a bucket (`gs://`). Everything else that looks like an
address is refused: taken for a local path, it would become a directory named `hdfs:`. Buckets of S3
are refused as well: neither TensorFlow nor etils opens them without more packages.
"""

import os
import re
import urllib.parse

from lmjax.errors import UserError, masked

BUCKETS = ("gs",)
ALIASES = {"gcs": "gs"}
# Schemes that people write. A name that begins so, like gs:bucket or s3//bucket, is a typing error.
SCHEMES = (*BUCKETS, *ALIASES, "s3", "s3a", "s3n", "az", "abfs", "abfss", "wasb", "wasbs", "hdfs",
           "hf", "http", "https", "ftp", "sftp", "dbfs", "oss", "file")
# What stands for "no path" elsewhere. Here the empty string does.
NOTHING = ("none", "null", "nil", "nan", "true", "false", "undefined")
# etils, through which checkpoints are written, reads /s3/logs as s3://logs.
MISREAD = re.compile(r"//?(gs|s3|az|hf)(?:/|$)")
VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})?")
ADDRESS = re.compile(r"([A-Za-z][\w+.-]*):(/*)(.*)", re.DOTALL)
TYPO = re.compile(rf"(?:{'|'.join(SCHEMES)})(?::|//)", re.IGNORECASE)


class Expanded(str):
    """A path that `expand` has returned: a `$` in it is part of a name."""


def expand(path: str | os.PathLike[str], where: str, *, bucket: bool = True) -> Expanded:
    """Returns the path or address that a user means.

    `~`, `~user`, `$NAME` and `${NAME}` are expanded, once. `file:///a%20b` becomes `/a b`, and
    `gcs://` becomes `gs://`. Relative paths stay relative, and links stay links.

    Args:
      path: what the user wrote; "" stays "". What `expand` has returned stays as it is.
      where: the key or option that it comes from, for errors.
      bucket: whether gs:// is possible here.

    Raises:
      UserError: a variable that is not set, an address of another kind, or a path that nobody can
        mean: `None`, spaces or quotes around it, backslashes.
    """
    written = os.fspath(path)
    if not isinstance(written, str):
        raise UserError("a path as text", repr(written), "decode it", where=where)
    text: str = written
    if not isinstance(written, Expanded):
        _check_spelling(written, where)
        text = VARIABLE.sub(lambda found: _value(found, written, where), written)
        text = _home(text, written, where)
        if found := ADDRESS.fullmatch(text):
            text = _from_address(text, found)
    if masked(text) != text:  # it would be written into the records of a run
        raise UserError("an address without credentials", text, "leave them out, and set "
                        "GOOGLE_APPLICATION_CREDENTIALS for buckets", where=where)
    if not is_bucket(text):
        _check_local(text, where, bucket)
    elif not bucket:
        raise _wrong_address(text, where, bucket)
    return Expanded(text)


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether an expanded path is in a bucket."""
    found = ADDRESS.fullmatch(str(path))
    return found is not None and found[1] in BUCKETS and found[2] == "//" and bool(found[3])


def _check_spelling(text: str, where: str) -> None:
    """Refuses what can only be a mistake: on disk it would become a name that nobody meant."""
    if text != text.strip() or any(ord(letter) < 32 for letter in text):
        raise UserError("a path without spaces or line ends around it", repr(text), "remove them",
                        where=where)
    if "\\" in text:
        raise UserError("a path of this system", repr(text), "write it with /, without \\",
                        where=where)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'`":
        raise UserError("a path", text, f"leave out the {text[0]} around it", where=where)
    if text.lower() in NOTHING:
        raise UserError("a path", text, "leave it empty if there is none, or write "
                        f"./{text} for a directory of that name", where=where)


def _value(found: re.Match[str], written: str, where: str) -> str:
    name = found[1] or found[2]
    if name is None:
        raise UserError("$NAME or ${NAME}", repr(written), "write the name of a variable after $",
                        where=where)
    value = os.environ.get(name, "")
    if not value:
        got = "an empty one" if name in os.environ else "none"
        raise UserError(f"a value of the variable {name} in {written!r}", got,
                        f"set it (export {name}=...), or write the path out", where=where)
    return value


def _home(text: str, written: str, where: str) -> str:
    if not text.startswith("~"):
        return text
    user = text.partition("/")[0].removeprefix("~")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") or (not user and os.environ.get("HOME") == ""):
        raise UserError(f"a home directory for {written!r}", f"no user {user!r}" if user else
                        "no HOME", "write the path out, or ./ before a name that begins with ~",
                        where=where)
    return expanded


def _from_address(text: str, found: re.Match[str]) -> str:
    """Returns `text`, which begins with NAME:, with a scheme that this module knows, if it can."""
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme == "file":
        host, _, path = (rest if slashes == "//" else f"/{rest}").partition("/")
        if slashes and host in ("", "localhost"):
            return "/" + urllib.parse.unquote(path)
    scheme = ALIASES.get(scheme, scheme)
    is_whole = scheme in BUCKETS and slashes == "//" and rest
    return f"{scheme}://{rest}" if is_whole else text


def _check_local(text: str, where: str, bucket: bool) -> None:
    found = ADDRESS.fullmatch(text)
    # The first directory of NAME:/... would be named `NAME:`.
    if (found and found[2]) or TYPO.match(text):
        raise _wrong_address(text, where, bucket)
    if text and (found := MISREAD.match(os.path.abspath(text))):
        raise UserError(f"a local path outside /{found[1]}", repr(text), "mount it elsewhere: "
                        f"libraries that lmjax uses take it for {found[1]}://", where=where)


def _wrong_address(text: str, where: str, bucket: bool) -> UserError:
    expected = "a local path or gs://BUCKET/DIR" if bucket else "a local path"
    fix = ("write one of these (mount a bucket of S3 as a directory)" if bucket
           else "use one, or a mounted file system")
    name = "" if "://" in text else ", or ./ before a name that really begins so"
    return UserError(expected, repr(text), f"{fix}{name}", where=where)
