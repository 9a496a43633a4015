"""Takes the weights of an existing model into a run whose model has the head of a task."""

import dataclasses

import jax

from lmjax.models.model import ModelConfig, build_model
from lmjax.nn.module import Params
from lmjax.tasks.task import Facts
from lmjax.training.pretrained import Pretrained
from lmjax.training.run import Run
from lmjax.training.shrink import SIZES, check_sizes, shrunk
from lmjax.training.vocabulary import extends, with_mean_rows
from lmjax.tree import named_leaves

# What the head of a task replaces: fields of a model's config that may differ from the source's.
REPLACED = ("head", "pooler", "mlm_head", "head_activation", "tie_embeddings", "output_bias")


def comparable(run: Run, source: Pretrained) -> ModelConfig:
    """The config of the run's model, with the fields of `source` that may differ from it.

    These are what the head of a task replaces, the scaling of RoPE and the sizes of a smaller model
    if the recipe says so, and a smaller vocabulary that the run's tokenizer extends.

    Raises:
      UserError: the model cannot be cut out of `source`.
    """
    config, theirs = run.model.config, source.recipe.model
    may = set(REPLACED) if config.head.outputs else set()
    may |= {"rope_theta", "rope_scaling"} if run.recipe.train.change_rope else set()
    may |= {"vocab_size"} if has_new_tokens(run, source) else set()
    if run.recipe.train.shrink and config.family == theirs.family:
        check_sizes(config, theirs)
        may |= set(SIZES)
    names = {field.name for field in dataclasses.fields(config)} & may
    return dataclasses.replace(config, **{name: getattr(theirs, name) for name in names
                                          if hasattr(theirs, name)})


def has_new_tokens(run: Run, source: Pretrained) -> bool:
    """Whether the run's tokenizer is that of `source` with more tokens, which get rows."""
    rows = run.model.config.vocab_size
    return not run.model.adapter.kind and rows >= source.recipe.model.vocab_size and extends(
        run.tokenizer, source.tokenizer)


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
    grows, shrinks = has_new_tokens(run, source), run.recipe.train.shrink
    if not (model.config.head.outputs or grows or shrinks):
        return source.read(model, shardings), []
    theirs = build_model(config, vocab_size=config.vocab_size, dtype=model.dtype,
                         platform=run.layout.mesh.devices.flat[0].platform, kernel=model.kernel)
    read = source.read(theirs, run.layout.tree(theirs.axes, theirs.shapes))
    if shrinks:
        read = jax.jit(lambda params: shrunk(params, theirs, model))(read)
    have = dict(named_leaves(read))
    have |= {name.replace("pooler", "task_head/dense", 1): leaf for name, leaf in have.items()
             if name.startswith("pooler/")}
    placed = dict(named_leaves(shardings))
    if grows:
        assert run.tokenizer is not None and source.tokenizer is not None
        have = with_mean_rows(have, source.tokenizer.vocab_size, run.tokenizer.vocab_size,
                              model.config.vocab_size, placed)
    if classes(source.about.get("task")) != classes(run.facts):
        have = {name: leaf for name, leaf in have.items() if not name.startswith("task_head/t")
                and name != "task_head/bias"}
    names = [name for name, _ in named_leaves(model.shapes)]
    new = [name for name, shape in named_leaves(model.shapes)
           if name not in have or have[name].shape != shape.shape]

    def make() -> dict[str, jax.Array]:
        made = dict(named_leaves(model.init(jax.random.key(run.recipe.train.seed))))
        return {name: made[name] for name in new}

    made = jax.jit(make, out_shardings={name: placed[name] for name in new})()
    leaves = [made[name] if name in made else have[name] for name in names]
    params = jax.tree.unflatten(jax.tree.structure(model.shapes), leaves)
    return jax.device_put(params, shardings) if shrinks else params, new


def classes(facts: Facts | None) -> Facts | None:
    """What a task keeps of its training examples, without how many there are of each class."""
    return facts and {name: value for name, value in facts.items() if name != "counts"}
