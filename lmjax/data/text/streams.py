"""The plain bytes of a file: its compression and its encoding, told by its content.

Everything is read in pieces. A file that ends too early is an error, whatever compressed it.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import lzma
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from lmjax.data.text.records import MOST_BYTES
from lmjax.errors import UserError, first_line

CHUNK = 1 << 20
PIECE = 1 << 17  # read at once: it stays in the processor's cache, and its memory is used again
_SKIPPABLE = bytes.fromhex("2a4d18")  # the end of the magic of frames that hold no data
_LAYERS = 3  # of compression, one around the other: servers compress what is compressed
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\n"

# What a file begins with, and how it is called, if lmjax does not read it.
UNREAD = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf\x27\x1c": "a 7z archive",
          b"Rar!\x1a\x07": "a rar archive", b"\x1f\x9d": "a .Z file",
          b"\x02\x21\x4c\x18": "a file of the old lz4 format", b"LZIP": "an lzip file",
          b"\xff\x06\0\0sNaPpY": "a snappy file", b"%PDF-": "a PDF", b"SQLite format 3\0": "SQLite"}
# What a file in another encoding than UTF-8 begins with; UTF-32 first, whose mark has UTF-16's.
_MARKS = {codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
          codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
          codecs.BOM_UTF8: "utf-8"}


class Opened(NamedTuple):
    """A file whose bytes are plain."""

    stream: io.BufferedReader
    compression: tuple[str, ...]  # from the outside inwards

    @property
    def head(self) -> bytes:
        """The beginning of what comes next, up to `CHUNK` bytes."""
        return self.stream.peek(CHUNK)


@contextlib.contextmanager
def opened(path: str) -> Iterator[Opened]:
    """Opens a file and undoes its compression.

    Raises:
      UserError: the file, or what is done with it inside the block, ends too early or is damaged.
    """
    with readable(path), contextlib.ExitStack() as stack:
        stream: io.BufferedReader = stack.enter_context(
            io.BufferedReader(io.FileIO(path), CHUNK))
        kinds: list[str] = []
        while kind := compression(stream.peek(CHUNK), path):
            if len(kinds) == _LAYERS:
                raise UserError(f"at most {_LAYERS} layers of compression", f"more in {path}",
                                "unpack it")
            kinds.append(kind)
            stream = io.BufferedReader(_DECOMPRESSORS[kind](stream), CHUNK)
        refuse_pointers(stream.peek(CHUNK), path)
        yield Opened(stream, tuple(kinds))


@contextlib.contextmanager
def readable(path: str) -> Iterator[None]:
    """Turns errors of reading a file into a `UserError`, and notices a file that changes."""
    try:
        before = os.stat(path)
        yield
        after = os.stat(path)
    except UserError:
        raise
    except (OSError, EOFError, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError("files that can be read", str(error),
                            "correct the path or its permissions") from error
        raise UserError("a whole file", f"{first_line(error)} in {path}",
                        "fetch it again") from error
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (
            after.st_size, after.st_mtime_ns, after.st_ino):
        raise UserError("files that stay as they are", f"{path}, which changed while it was read",
                        "start again when it is written")


def compression(head: bytes, path: str = "") -> str:
    """Returns what a file is compressed with, by its first bytes; "" if it is not."""
    skipped = False
    while head[1:4] == _SKIPPABLE and head[0] >> 4 == 5:  # of zstd or lz4
        head, skipped = head[8 + int.from_bytes(head[4:8], "little"):], True
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bz2"
    for magic, name in ((b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"),
                        (b"\x04\x22\x4d\x18", "lz4")):
        if head.startswith(magic):
            return name
    return ("lz4" if path.endswith(".lz4") else "zstd") if skipped else ""


def encoding(head: bytes) -> str:
    """Returns the encoding of a file of text, by its first bytes: utf-8, utf-16-le, ..."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return name
    head = head[: min(len(head), 4096) // 4 * 4]
    if b"\0" in head:  # without a mark: which bytes of four are NUL in mostly ASCII text
        quarter = max(len(head) // 4, 1)
        a, b, c, d = (head[i::4].count(0) > 0.7 * quarter for i in range(4))
        return {(False, True, False, True): "utf-16-le", (True, False, True, False): "utf-16-be",
                (False, True, True, True): "utf-32-le",
                (True, True, True, False): "utf-32-be"}.get((a, b, c, d), "utf-8")
    return "utf-8"


def utf8(stream: io.BufferedReader) -> io.BufferedReader:
    """Returns the stream as UTF-8 without a byte-order mark.

    What the encoding does not allow becomes bytes that are no UTF-8.
    """
    head = stream.peek(CHUNK)
    name = encoding(head)
    for mark in _MARKS:
        if head.startswith(mark):
            stream.read(len(mark))
            break
    if name == "utf-8":
        return stream

    def pieces() -> Iterator[bytes]:
        decoder = codecs.getincrementaldecoder(name)("surrogatepass")
        try:
            while block := stream.read(CHUNK):
                yield decoder.decode(block).encode(errors="surrogatepass")
            yield decoder.decode(b"", final=True).encode()
        except UnicodeError as error:
            raise EOFError(f"no {name}: {first_line(error)}") from error

    return io.BufferedReader(_Pieces(pieces()), CHUNK)


def lines(stream: io.BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Yields each line without its end, and its length.

    Lines end with a line feed, or with a carriage return in a file that has no line feed. A line
    beyond `MOST_BYTES` is cut to its beginning.
    """
    head = stream.peek(CHUNK)
    end = b"\r" if b"\r" in head[:-1] and b"\n" not in head else b"\n"
    parts: list[bytes] = []
    size = 0
    while block := stream.read(PIECE):
        first, *others = block.split(end)
        size += len(first)
        parts.append(first)
        if size > MOST_BYTES:
            del parts[1:]
        if others:
            yield (parts[0] if len(parts) == 1 else b"".join(parts)), size
            for line in others[:-1]:
                yield line, len(line)
            parts, size = [others[-1]], len(others[-1])
    if size:
        yield b"".join(parts), size


def refuse_pointers(head: bytes, path: str) -> None:
    """Raises a UserError for a file that only stands for one that was not fetched."""
    if head.startswith(LFS_POINTER):
        raise UserError("the file itself", f"a Git LFS pointer in {path}", "run git lfs pull")


def unread(head: bytes) -> str:
    """Says what a file is that lmjax does not read, by its first bytes; "" for any other."""
    found = next((name for magic, name in UNREAD.items() if head.startswith(magic)), "")
    return "a tar archive" if not found and head[257:262] == b"ustar" else found


class _Pieces(io.RawIOBase):
    """A file of the bytes that an iterator gives."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        done = 0
        while done < len(buffer):
            if not self._rest:
                piece = next(self._pieces, None)
                if piece is None:
                    break
                self._rest = memoryview(piece)
                continue
            part = self._rest[: len(buffer) - done]
            buffer[done : done + len(part)] = part
            self._rest, done = self._rest[len(part) :], done + len(part)
        return done


def _arrow(name: str) -> Callable[[BinaryIO], Any]:
    def decompress(stream: BinaryIO) -> Any:
        import pyarrow as pa  # its streams notice a truncated file, and read several members

        return pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), name)

    return decompress


def _xz(stream: BinaryIO) -> _Pieces:
    """Reads every stream of an .xz file; the standard library's file passes over damaged ones."""
    def pieces() -> Iterator[bytes]:
        decoder, raw = None, b""
        while raw or (raw := stream.read(CHUNK)):
            if decoder is None:
                raw = raw.lstrip(b"\0")  # padding between streams
                if not raw:
                    continue
                decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ)
            yield decoder.decompress(raw, CHUNK)
            while not decoder.eof and not decoder.needs_input:
                yield decoder.decompress(b"", CHUNK)
            raw = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
        if decoder is not None:
            raise EOFError("Truncated compressed stream")

    return _Pieces(pieces())


def _zstd(stream: BinaryIO) -> _Pieces:
    """Reads with Arrow, and with zstandard from where a frame's window is too long for Arrow."""
    def pieces() -> Iterator[bytes]:
        done = 0
        try:
            arrow = _arrow("zstd")(stream)
            while block := arrow.read(PIECE):
                done += len(block)
                yield block
            return
        except OSError as error:
            if "too much memory" not in str(error):
                raise
        for block in _long_windows(stream):
            yield block[done:]
            done = max(0, done - len(block))

    return _Pieces(pieces())


def _long_windows(stream: BinaryIO) -> Iterator[bytes]:
    """Reads frames with windows of up to 2 GiB, from the beginning of the stream."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError("the package zstandard, for windows beyond 128 MiB", "none",
                        "pip install 'lmjax[formats]'") from error
    stream.seek(0)
    maker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    decoder = None
    try:
        while raw := stream.read(1 << 12):  # each could become 2**15 times as long
            while raw:
                decoder = decoder or maker.decompressobj()
                yield decoder.decompress(raw)
                raw = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    except zstandard.ZstdError as error:
        raise EOFError(first_line(error)) from error
    if decoder is not None:
        raise EOFError("Truncated compressed stream")


_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    "gzip": _arrow("gzip"), "bz2": _arrow("bz2"), "lz4": _arrow("lz4"), "xz": _xz, "zstd": _zstd}
