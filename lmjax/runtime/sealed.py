"""JSON files that hold their own hash, and the hashes of files beside them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from lmjax.errors import UserError, first_line
from lmjax.runtime.files import write_whole

SEAL = "own_sha256"  # the key of a file's own hash: the sha256 of all its other keys
FILES = "files"  # the key of the sha256 of other files, by their path from the file's folder
AGAIN = "delete the directory and prepare the data again"


def write_sealed(path: epath.Path, value: Mapping[str, Any]) -> None:
    """Writes an object as JSON with its own hash; a kill leaves the old file or the new one."""
    text = json.dumps({**value, SEAL: _seal(value)}, indent=1, ensure_ascii=False) + "\n"
    if "://" in str(path):
        path.write_text(text)  # a bucket's objects are whole or not there
    else:
        write_whole(Path(path), text)


def read_sealed(path: epath.Path, fix: str = AGAIN) -> Any:
    """Reads what `write_sealed` wrote, without the hash. A file without a hash is older: it passes.

    Raises:
      UserError: the file is missing or not JSON, or does not have the hash that it names.
    """
    if not path.exists():
        raise UserError("a JSON file", "none", fix, where=str(path))
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UserError("JSON", first_line(error), fix, where=str(path)) from error
    if isinstance(value, dict) and SEAL in value:
        wanted = value.pop(SEAL)
        if _seal(value) != wanted:
            raise UserError(f"content of sha256 {wanted!s:.12}", f"sha256 {_seal(value):.12}", fix,
                            where=str(path))
    return value


def hashes_of(folder: epath.Path, names: Iterable[str]) -> dict[str, str]:
    """Returns the sha256 of these files, for the key FILES of a sealed file."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def read_listed(folder: str | epath.Path, name: str, manifest: Mapping[str, Any],
                fix: str = AGAIN) -> bytes:
    """Reads a file and compares it with its hash in a manifest, if that lists it.

    Raises:
      UserError: the file is missing, or is not the one that the manifest lists.
    """
    path = epath.Path(folder) / name
    wanted = manifest.get(FILES, {}).get(name)
    expected = f"the file of sha256 {wanted:.12}" if wanted else "the file"
    if not path.exists():
        raise UserError(expected, "none", fix, where=str(path))
    content = path.read_bytes()
    got = hashlib.sha256(content).hexdigest()
    if wanted and got != wanted:
        raise UserError(expected, f"sha256 {got:.12}", fix, where=str(path))
    return content


def _seal(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
