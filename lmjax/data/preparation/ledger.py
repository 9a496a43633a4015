"""The ledger of prepared data: a row for every document that was removed, and the look-up by id."""

from __future__ import annotations

import pyarrow as pa

from lmjax.data import store
from lmjax.data.preparation import shards
from lmjax.data.preparation.stages import Prepared
from lmjax.errors import UserError, first_line
from lmjax.runtime.sealed import AGAIN, read_listed

FILE = "ledger.parquet"
# by: the id of the document that stays instead, "" if there is none. value: what the rule measured.
COLUMNS = pa.schema([(name, pa.string()) for name in ("id", "source", "stage", "rule", "by")]
                    + [("value", pa.float64())])


def write_ledger(made: Prepared, directory: str) -> None:
    """Writes `ledger.parquet` from the ledgers of all shards."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(f"{directory}/{FILE}", COLUMNS, compression="zstd") as out:
        for corpus in made.corpora:
            for part in corpus.parts:
                rows = shards.read(f"{part.path}.ledger").to_pydict()
                count = len(rows["id"])
                rows |= {"source": [part.source] * count, "stage": [corpus.stage.name] * count}
                if count:
                    table = pa.table({name: rows[name] for name in COLUMNS.names}, schema=COLUMNS)
                    out.write_table(table)


def trace(directory: str, name: str) -> list[str]:
    """Says what happened to the document with this id, and which copies of it were removed.

    Returns:
      a sentence per split that holds the document, and per row of the ledger that names it.
    Raises:
      UserError: `directory` is not prepared data, or no such document was read.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    lines, manifest = [], store.read_manifest(directory)
    for source, entry in manifest["sources"].items():
        for split in ("train", "heldout"):
            if name in store.SplitStore(directory, source, split, entry[split]).ids:
                lines.append(f"{source}: {name} is in the {split} split")
    content = read_listed(directory, FILE, manifest)
    try:
        rows = pq.read_table(pa.BufferReader(content))
    except (ValueError, OSError) as error:  # as Arrow's errors are
        raise UserError("a table in Parquet", first_line(error), AGAIN,
                        where=f"{directory}/{FILE}") from error
    mine = rows.filter(pc.or_(pc.equal(rows["id"], name), pc.equal(rows["by"], name))).to_pylist()
    for row in mine:
        why = f" for {row['by']}, which stays" if row["by"] else ""
        lines.append(f"{row['source']}: {row['id']} was removed in {row['stage']} by {row['rule']}"
                     f"{why} ({row['value']:.4g})")
    if not lines:
        raise UserError("the id of a document that was read", repr(name),
                        f"ids.txt of each split and {FILE} list them", where=directory)
    return lines
