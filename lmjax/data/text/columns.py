"""Records of Parquet and Arrow files: one column of texts, in batches of bounded size."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from lmjax.data.text.records import Record, text_of
from lmjax.data.text.streams import CHUNK
from lmjax.errors import UserError, first_line

BATCH_BYTES = 4 << 20  # of text that are decoded at once, as far as a file's statistics tell
MOST_ROWS = 1024
# Reads a column piece by piece. Read ahead, or by threads, it would be held whole and encoded.
LEAN: dict[str, Any] = {"buffer_size": CHUNK, "pre_buffer": False}
# What Parquet puts between a column of lists and what its items have.
_LISTS = re.compile(r"\.(list\.(element|item)|bag\.array_element|array)(?=\.|$)")


def read_parquet(name: str, path: str, stream: io.BufferedReader | None,
                 field: str) -> Iterator[Record]:
    """The records of a Parquet file; the id has the number of the row.

    Args:
      name: of the file.
      path: of the file.
      stream: its bytes if it is compressed as a whole: they are unpacked to a temporary file.
      field: the column, or `a.b` for a field of a column; "": all columns, as JSON.
    Raises:
      UserError: the file is damaged, or has no such column of text.
    """
    import pyarrow.parquet as pq

    with _arrow_errors(path, "Parquet"), contextlib.ExitStack() as stack:
        file: Any = path
        if stream is not None:
            file = stack.enter_context(tempfile.TemporaryFile())
            while block := stream.read(CHUNK):
                file.write(block)
            file.seek(0)
        table = stack.enter_context(pq.ParquetFile(file, **LEAN))
        check_column(table.schema_arrow, field, path)
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        leaf = [i for i, full in enumerate(paths) if full == field or not field
                or f"{_LISTS.sub('', full)}.".startswith(f"{field}.")]
        as_dictionary = None
        row = 0
        for group in range(table.num_row_groups):
            facts = table.metadata.row_group(group)
            size = sum(facts.column(i).total_uncompressed_size for i in leaf)
            rows = max(1, min(MOST_ROWS, BATCH_BYTES * facts.num_rows // max(size, 1)))
            reader = table
            if field and leaf and _repeats(facts.column(leaf[0])):
                as_dictionary = as_dictionary or stack.enter_context(
                    pq.ParquetFile(file, **LEAN, read_dictionary=[paths[i] for i in leaf]))
                reader = as_dictionary
            for batch in reader.iter_batches(rows, row_groups=[group],
                                            columns=[paths[i] for i in leaf], use_threads=False):
                for text in _texts(batch, field):
                    yield f"{name}:{row}", text
                    row += 1


def read_arrow(name: str, path: str, stream: io.BufferedReader, field: str) -> Iterator[Record]:
    """The records of an Arrow file or stream, also compressed; the id has the row's number."""
    import pyarrow as pa

    with _arrow_errors(path, "Arrow"):
        if stream.peek(8)[:6] == b"ARROW1":  # the stream begins after the magic
            stream.read(8)
        table = pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))
        check_column(table.schema, field, path)
        row = 0
        for batch in table:
            for start in range(0, len(batch), MOST_ROWS):
                for text in _texts(batch.slice(start, MOST_ROWS), field):
                    yield f"{name}:{row}", text
                    row += 1


def check_column(schema: Any, field: str, path: str) -> None:
    """Raises a UserError unless a column, or a field of a column, holds the texts."""
    import pyarrow as pa

    if not field:
        return
    kind, names = None, schema.names
    if names.count(field) == 1:
        kind = schema.field(field).type
    elif field not in names and names.count(field.partition(".")[0]) == 1:
        kind = schema.field(field.partition(".")[0]).type
        for part in field.split(".")[1:]:
            kind = getattr(kind, "value_type", kind)
            index = kind.get_field_index(part) if pa.types.is_struct(kind) else -1
            kind = kind.field(index).type if index >= 0 else None
            if kind is None:
                break
    if kind is None:
        raise UserError(f"a column {field!r}", f"{_columns(schema)} in {path}", "set text_field")
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    if not any(word in str(kind) for word in ("string", "binary", "null")):
        raise UserError(f"text in the column {field!r}", f"{kind} in {path}", "set text_field")


def _columns(schema: Any) -> list[str]:
    """The names of the columns; the fields of a column without text of its own as a.b."""
    found = []
    for column in schema:
        kind = column.type
        while hasattr(kind, "value_type"):
            kind = kind.value_type
        below = [f"{column.name}.{field.name}" for field in getattr(kind, "fields", ())]
        found += below or [column.name]
    return found


def _repeats(column: Any) -> bool:
    """Whether most of a column's bytes are a dictionary, whose values may stand in many rows."""
    if not column.has_dictionary_page or column.dictionary_page_offset is None:
        return False
    dictionary = column.data_page_offset - column.dictionary_page_offset
    return 2 * dictionary > column.total_compressed_size > 1 << 16


def _texts(batch: Any, field: str) -> Iterator[Any]:
    import pyarrow as pa

    if not field:
        for row in range(len(batch)):
            try:
                yield text_of(batch.slice(row, 1).to_pylist()[0], "")
            except UnicodeDecodeError as error:
                yield error.object
        return
    column = batch.column(batch.schema.get_field_index(field)) if field in batch.schema.names else (
        batch.column(batch.schema.get_field_index(field.partition(".")[0])))
    if pa.types.is_dictionary(column.type) and not pa.types.is_nested(column.type.value_type):
        values = column.dictionary.cast(pa.large_binary())
        for index in column.indices.to_pylist():
            text = None if index is None else values[index].as_py()
            yield text if text is not None else text_of({field: None}, field)
        return
    if not pa.types.is_nested(column.type):
        # As bytes, because Parquet does not check that its strings are UTF-8.
        for text in column.cast(pa.large_binary()).to_pylist():
            yield text if text is not None else text_of({field: None}, field)
        return
    top = field if field in batch.schema.names else field.partition(".")[0]
    for value in column:
        try:
            yield text_of({top: value.as_py()}, field)
        except UnicodeDecodeError as error:
            yield error.object


@contextlib.contextmanager
def _arrow_errors(path: str, what: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"a whole {what} file", f"{first_line(error)} in {path}",
                        "fetch it again, or use a text column") from error
