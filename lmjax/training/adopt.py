"""Takes the weights of an existing model into a run whose model has the head of a task."""

import dataclasses

import jax

from lmjax.models.model import ModelConfig, build_model
from lmjax.nn.module import Params
from lmjax.training.pretrained import Pretrained
from lmjax.training.run import Run
from lmjax.tree import named_leaves

# What the head of a task replaces: fields of a model's config that may differ from the source's.
REPLACED = ("head", "pooler", "mlm_head", "head_activation", "tie_embeddings", "output_bias")


def comparable(config: ModelConfig, source: ModelConfig) -> ModelConfig:
    """`config` with the fields of `source` in what the head of a task replaces, if it has one."""
    if not config.head.outputs:
        return config
    names = {field.name for field in dataclasses.fields(config)} & set(REPLACED)
    return dataclasses.replace(config, **{name: getattr(source, name) for name in names
                                          if hasattr(source, name)})


def adopted(run: Run, source: Pretrained) -> tuple[Params, list[str]]:
    """The first parameters of `run`: those of `source`, with new ones where it has none.

    Those of adapters are left out.

    The pooler of BERT goes on as the dense layer of a head of the kind "pooler". A head goes on if
    it was trained for the same classes.

    Returns:
      (parameters, placed as the run's; names of those that are new)
    """
    model, config = run.model.plain, source.recipe.model
    shardings = run.layout.tree(model.axes, model.shapes)
    if not model.config.head.outputs:
        return source.read(model, shardings), []
    theirs = build_model(config, vocab_size=config.vocab_size, dtype=model.dtype,
                         platform=run.layout.mesh.devices.flat[0].platform, kernel=model.kernel)
    read = source.read(theirs, run.layout.tree(theirs.axes, theirs.shapes))
    have = dict(named_leaves(read))
    have |= {name.replace("pooler", "task_head/dense", 1): leaf for name, leaf in have.items()
             if name.startswith("pooler/")}
    if source.about.get("task") != run.facts:
        have = {name: leaf for name, leaf in have.items() if not name.startswith("task_head/t")
                and name != "task_head/bias"}
    names = [name for name, _ in named_leaves(model.shapes)]
    new = [name for name, shape in named_leaves(model.shapes)
           if name not in have or have[name].shape != shape.shape]
    placed = dict(named_leaves(shardings))

    def make() -> dict[str, jax.Array]:
        made = dict(named_leaves(model.init(jax.random.key(run.recipe.train.seed))))
        return {name: made[name] for name in new}

    made = jax.jit(make, out_shardings={name: placed[name] for name in new})()
    leaves = [made[name] if name in made else have[name] for name in names]
    return jax.tree.unflatten(jax.tree.structure(model.shapes), leaves), new
