"""The doctor's look at runs and checkpoints."""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import StandardCheckpointHandler
from orbax.checkpoint.args import StandardRestore

from lmjax.cli.doctor.diagnosis import BAD, GOOD, NOTE, Diagnosis
from lmjax.cli.doctor.reading import describe_reading
from lmjax.errors import UserError, first_line
from lmjax.monitoring.units import human_bytes, human_count
from lmjax.runtime.files import check_writable
from lmjax.training.checkpoint import About, checkpoint_steps, read_about
from lmjax.training.checksums import verify
from lmjax.training.recipe import Recipe, recorded_recipe
from lmjax.training.saved import find_saved
from lmjax.training.task_data import open_data
from lmjax.tree import named_leaves, num_bytes

# Commands by architecture.
USES = {
    "decoder": ("lmjax generate {} --prompt 'Once upon a time'", "lmjax score {} FILE",
                "lmjax serve {}", "lmjax eval {} --tasks NAME"),
    "encoder": ("lmjax.load('{}').embed(texts)",),
    "encdec": ("lmjax generate {} --prompt 'Once upon a time'",),
}
MOST_PROMPTS = 3  # that are shown
LOSSES = ("loss", "eval/loss", "eval_ema/loss")  # in metrics.jsonl; NaN stands there as "nan"
MODEL_USES = ("lmjax export-hf {} --out DIR",
              "lmjax train --config FILE --workdir DIR --config.train.init_from={}")


def is_checkpoint(path: str) -> bool:
    """Whether `path` is the directory of one checkpoint."""
    return (epath.Path(path) / "about").is_dir()


def is_checkpoints(path: str) -> bool:
    """Whether `path` is a directory of checkpoints."""
    return bool(checkpoint_steps(path)) or bool(_unfinished(epath.Path(path)))


def is_run(path: str) -> bool:
    """Whether `path` is the directory of a run, even of one that has lost some of its files."""
    where = Path(path)
    files = ("run.json", "metrics.jsonl", "saved.json")
    return (where / "checkpoints").is_dir() or any((where / name).is_file() for name in files)


def examine_checkpoint(path: str, whole: bool) -> Diagnosis:
    """Examines one checkpoint."""
    found = Diagnosis(path, "a checkpoint of lmjax")
    about = _check_checkpoint(found, epath.Path(path), whole)
    if about:
        describe_reading(found, path)
        found.uses += model_uses(path, recorded_recipe(about["recipe"]))
    return found


def examine_checkpoints(path: str, whole: bool) -> Diagnosis:
    """Examines a directory of checkpoints."""
    found = Diagnosis(path, "a directory of checkpoints")
    about = _check_checkpoints(found, path, whole)
    if about:
        describe_reading(found, path)
        found.uses += model_uses(path, recorded_recipe(about["recipe"]))
    return found


def examine_run(path: str, whole: bool) -> Diagnosis:
    """Examines the directory of a run: its config, checkpoints, data and metrics."""
    where, found = Path(path), Diagnosis(path, "a run of lmjax")
    recipe = _read_recipe(found, where)
    directory = recipe.checkpoint.path(where) if recipe else str(where / "checkpoints")
    about = _check_checkpoints(found, directory, whole)
    if about:
        describe_reading(found, directory)
    found.check("saved.json", lambda: _check_saved(recipe, where, about))
    for place in dict.fromkeys((path, directory)):
        _check_place(found, place)
    if recipe is None:
        return found
    found.kind = (f"a run of lmjax, at step {about['step'] if about else 0:,} "
                  f"of {recipe.train.steps:,}")
    if not recipe.data.synthetic:
        found.check("data", lambda: _data(recipe, where, about, whole))
    _check_metrics(found, where, about)
    if about:  # a run's directory stands for its model only with the checkpoints in it
        found.uses += model_uses(directory if recipe.checkpoint.directory else path,
                                 recorded_recipe(about["recipe"]))
    found.uses += [f"lmjax report --workdir {path}", f"lmjax data show --workdir {path} --step 1"]
    return found


def model_uses(path: str, recipe: Recipe) -> list[str]:
    """The commands that take a trained model."""
    return [use.format(path) for use in (*USES[recipe.model.family], *MODEL_USES)]


def describe_model(recipe: Recipe, parameters: int) -> str:
    """A model's architecture and size, in words."""
    c = recipe.model
    return (f"{c.family} of {human_count(parameters)} parameters: {c.num_layers} layers of "
            f"{c.embed_dim}, {c.vocab_size:,} tokens, rows of {recipe.data.seq_len:,}")


def _read_recipe(found: Diagnosis, where: Path) -> Recipe | None:
    recipes: list[Recipe] = []

    def read() -> str:
        file = where / "config.json"
        if not file.exists():
            raise UserError("the run's config.json", "none", "a start with the run's --config "
                            "writes it again", where=str(where))
        try:
            recipes.append(recorded_recipe(json.loads(file.read_text())))
        except json.JSONDecodeError as error:
            raise UserError("a config as JSON", error, "the file is damaged, move it away to go by "
                            "the checkpoints alone", where=str(file)) from None
        return "complete"

    if not found.check("config", read):
        return None
    if any(prompts := recipes[0].sample.prompts):
        shown = ", ".join(map(repr, prompts[:MOST_PROMPTS]))
        found.add(GOOD, "prompts", f"{len(prompts)} to sample from: {shown}")
    return recipes[0]


def _check_checkpoints(found: Diagnosis, directory: str, whole: bool) -> About | None:
    """Adds what the checkpoints of `directory` are; returns the `about` of the newest good one."""
    where = epath.Path(directory)
    steps = checkpoint_steps(directory)
    if where.is_dir():
        for name in _unfinished(where):
            found.add(NOTE, "checkpoints", f"{name} was not saved to its end; it is never read")
        for name in sorted(p.name for p in where.iterdir() if p.name.startswith("damaged-")):
            found.add(NOTE, "checkpoints", f"{name} was found damaged and set aside")
    if not steps:
        found.add(NOTE, "checkpoints", f"none in {directory}")
        return None
    newest: About | None = None
    for step in reversed(steps):
        if newest := _check_checkpoint(found, where / str(step), whole):
            break
    older = [step for step in steps if newest and step < newest["step"]]
    if older:
        found.add(NOTE, "checkpoints", f"older ones, not examined: {', '.join(map(str, older))}")
    return newest


def _check_saved(recipe: Recipe | None, where: Path, about: About | None) -> str:
    """Compares what the run remembers of its checkpoints with those that are there."""
    if recipe is None:
        return "not compared, for want of a config"
    saved = find_saved(recipe, where)
    if not saved.step:
        return "nothing saved yet"
    told = f"the newest checkpoint, of step {saved.step}, is there"
    if about and about.get("unfinished", False) and saved.evaluated < about["step"]:
        told += "; its evaluation did not end, and the next start does it again"
    return told


def _check_place(found: Diagnosis, place: str) -> None:
    """Says whether a run can go on where it is; that it is read-only does not damage it."""
    try:
        check_writable(place, place)
    except UserError as error:
        found.add(NOTE, "place", f"the run can be read and cannot go on: {first_line(error)}")


def _unfinished(where: epath.Path) -> list[str]:
    complete = set(map(str, checkpoint_steps(where)))
    if not where.is_dir():
        return []
    return sorted(p.name for p in where.iterdir() if p.name.isdigit() and p.name not in complete
                  and (p / "about").exists())


def _check_checkpoint(found: Diagnosis, path: epath.Path, whole: bool) -> About | None:
    """Adds what one checkpoint is; returns its `about` if it is whole."""
    abouts: list[About] = []

    def describe() -> str:
        abouts.append(read_about(path))
        return describe_model(recorded_recipe(abouts[0]["recipe"]),
                              sum(math.prod(leaf.shape) for leaf in _leaves(path / "params")))

    name = f"step {path.name}"
    if not found.check(name, describe):
        return None
    about, versions = abouts[0], abouts[0]["versions"]
    found.add(NOTE, name, f"written by lmjax {versions['lmjax']} with jax {versions['jax']}")
    if whole and not found.check(name, lambda: _verify(path, about)):
        return None
    return about


def _shapes(path: epath.Path) -> Any:
    """The tree of an item's arrays, as `ShapeDtypeStruct`s in the host's memory."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with contextlib.closing(StandardCheckpointHandler()) as handler:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                              sharding=device),
                            handler.metadata(path))


def _leaves(path: epath.Path) -> list[Any]:
    try:
        return jax.tree.leaves(_shapes(path))
    except Exception as error:  # noqa: BLE001 - a damaged file makes readers raise anything
        raise _damaged(path, error) from None


def _damaged(path: epath.Path, error: Exception) -> Exception:
    """Returns the error of a damaged checkpoint, or `error` if it says nothing about that."""
    if isinstance(error, MemoryError | OSError) or re.search(
            "Out of memory|RESOURCE_EXHAUSTED", str(error)):
        return error
    return UserError("readable arrays", first_line(error), "the checkpoint is damaged, take "
                     "another one", where=str(path))


def _verify(path: epath.Path, about: About) -> str:
    """Reads every array of a checkpoint, and compares it with its checksum."""
    size, odd = 0, []
    for item, expected in about["checksums"].items():
        try:
            with contextlib.closing(StandardCheckpointHandler()) as handler:
                tree = handler.restore(path / item, args=StandardRestore(_shapes(path / item)))
        except Exception as error:  # noqa: BLE001
            raise _damaged(path / item, error) from None
        verify({item: tree}, {item: expected})
        odd += [f"{item}/{name}" for name in not_finite(tree)]
        size += num_bytes(tree)
    if odd:
        raise UserError("finite numbers", f"NaN or infinity in {odd[0]}"
                        + f" and {len(odd) - 1} more" * (len(odd) > 1),
                        "take an earlier checkpoint", where=str(path))
    count = sum(map(len, about["checksums"].values()))
    return f"{count} arrays ({human_bytes(size)}), all with the checksums that were saved"


def not_finite(tree: Any) -> list[str]:
    """Names of the arrays that hold a NaN or an infinity."""
    return [name for name, leaf in named_leaves(tree) if not bool(_is_finite(leaf))]


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _data(recipe: Recipe, where: Path, about: About | None, whole: bool) -> str:
    directory = recipe.data.directory or str(where.absolute() / "data")
    split, *_ = open_data(recipe, directory, verify=whole)
    if about:
        saved, now = about["data"]["fingerprint"], split.fingerprint_of(about["data"]["next_row"])
        if saved != now:
            raise UserError(f"the data that the run was trained on ({saved[:12]})",
                            f"data {now[:12]}", "restore it", where=directory)
    return f"{directory} holds the data of the run"


def _check_metrics(found: Diagnosis, where: Path, about: About | None) -> None:
    file = where / "metrics.jsonl"
    if not file.is_file():
        if about and about["step"]:
            found.add(BAD, "metrics", f"{file} is missing; `lmjax report` has no curves to draw")
        return
    rows: list[dict[str, Any]] = []
    broken = 0
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
                continue
        broken += 1
    last = max((row.get("step", 0) for row in rows), default=0)
    bad = sum(any(str(row.get(name)) in ("nan", "inf", "-inf") for name in LOSSES) for row in rows)
    found.add(BAD if bad else NOTE if broken else GOOD, "metrics",
              f"{len(rows):,} lines up to step {last:,}"
              + f", {bad} with a loss that is not finite" * bool(bad)
              + f", {broken} that are no JSON objects and are passed over" * bool(broken))
