"""The log-likelihoods of a reference model, computed once and stored with the examples."""

import functools

import jax
import numpy as np

from lmjax.data import store
from lmjax.data.batches import eval_batches
from lmjax.data.pipeline import InOrder
from lmjax.decoding.generate import jit_on
from lmjax.errors import UserError
from lmjax.runtime.distributed import agreed
from lmjax.sharding import make_layout
from lmjax.tasks.preferences import REFERENCE, Preferences, log_likelihoods
from lmjax.tasks.prepare import read_manifest
from lmjax.tasks.rows import ExampleRows, open_rows
from lmjax.training.checksums import checksums
from lmjax.training.pretrained import Pretrained
from lmjax.training.program import make_model
from lmjax.training.recipe import Recipe
from lmjax.training.run import Log
from lmjax.training.task_data import sizes_of


def add_reference(recipe: Recipe, directory: str, source: Pretrained | None, log: Log) -> None:
    """Adds the reference's log-likelihoods to prepared preferences, if the task needs them.

    Args:
      recipe: of the run.
      directory: of the prepared examples.
      source: the model that the run starts from, which is the reference; None: the run resumes.
      log: gets a line when they are computed.

    Raises:
      UserError: there is no source, or the examples have the log-likelihoods of another one.
    """
    task = recipe.task
    if not (isinstance(task, Preferences) and task.needs_reference):
        return
    known = read_manifest(directory).get("reference")
    if source is None:
        if known is None:
            raise UserError(f"a model to start from, which is the reference of {task.kind}", "none",
                            "set it, or task.kind=orpo, which needs none",
                            where="config.train.init_from")
        return
    layout = make_layout(recipe.mesh)
    model = make_model(recipe, layout, vocab_size=recipe.model.vocab_size).plain  # no adapters
    params = source.read(model, layout.tree(model.axes, model.shapes))
    sums = checksums(params)
    if known is not None:
        if known["checksums"] != sums:
            raise UserError(f"the reference of the prepared examples, {known['path']}",
                            f"{source.where}, which has other weights",
                            "use another data.directory or workdir", where="train.init_from")
        return
    score = jit_on(layout, functools.partial(log_likelihoods, model,
                                             chunk=recipe.train.loss_chunk),
                   out_shardings=layout.replicated)
    size = recipe.eval.batch_size or recipe.train.batch_size
    manifest = read_manifest(directory)
    for place, entry in manifest["splits"].items():
        rows = open_rows(task, recipe.data, directory, place, sizes=sizes_of(recipe),
                         vocab_size=model.config.vocab_size)
        batches = eval_batches(InOrder([rows]), size, layout.sharding(("batch", "seq")))
        found = [np.stack(jax.device_get(score(params, batch)[:2]), axis=1) for batch in batches]
        values = np.concatenate(found)[: rows.num_rows]
        entry["columns"][REFERENCE] = agreed(functools.partial(_write, directory, rows, place,
                                                               values))
    log(f"reference: the log-likelihoods of {source.where} are stored with the examples")
    manifest["reference"] = {"path": source.where, "checksums": sums}
    agreed(lambda: store.write_manifest(directory, manifest))


def _write(directory: str, rows: ExampleRows, place: str, values: np.ndarray) -> dict:
    """Writes the column of one split; `values` are float32 [examples, 2]."""
    name, _, split = place.rpartition("/")
    return store.write_split(directory, f"{name}/{split}", REFERENCE,
                             list(values.astype(np.float32).view(np.uint32)), [],
                             vocab_size=1 << 32, text_bytes=0)
