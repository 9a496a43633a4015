"""The data of a run: prepared text, or the examples of a task."""

from lmjax.data.pipeline import Mixture, Split, open_splits
from lmjax.data.reading import check_told, make_reader
from lmjax.data.tokenizers import prepared_tokenizer
from lmjax.decoding.inputs import check_positions
from lmjax.errors import UserError
from lmjax.tasks.prepare import Setting, prepare_examples, read_manifest
from lmjax.tasks.rows import open_examples
from lmjax.tasks.task import Facts, Sizes, Task
from lmjax.tasks.writing import WritingTask
from lmjax.training.pretrained import Pretrained, make_tokenizer
from lmjax.training.recipe import Recipe
from lmjax.training.run import Log


def prepare_task(recipe: Recipe, directory: str, source: Pretrained | None, log: Log) -> None:
    """Prepares the examples of the recipe's task in `directory`, unless that is done.

    Args:
      recipe: with a task.
      directory: of the prepared examples.
      source: the model that the run starts from, whose tokenizer is taken; None: a new model.
      log: gets a line for each part of the work.

    Raises:
      UserError: an error of `prepare_examples`.
    """
    assert isinstance(recipe.task, Task)
    recipe.task.check_installed()
    tokenizer = None if source is None else source.tokenizer
    if source is not None and tokenizer is None and not recipe.data.tokenizer.path:
        raise UserError("a model with a tokenizer", f"{source.where}, which has none",
                        "set data.tokenizer.path", where="train.init_from")
    about = {} if source is None else {**source.about, "init_from": source.where}
    if isinstance(recipe.task, WritingTask):
        check_positions(recipe.model, recipe.task.room(sizes_of(recipe)), "config.task.max_tokens",
                        answer=recipe.task.max_tokens)
        if "huggingface" in about:
            check_told(about["huggingface"])
    prepare_examples(
        Setting(recipe.task, recipe.data, sizes_of(recipe), recipe.model.family), directory,
        log=log, resumes=source is None and bool(recipe.train.init_from),
        make_tokenizer=lambda texts: tokenizer or make_tokenizer(recipe.data.tokenizer, texts),
        make_reader=lambda made: make_reader(made, recipe.model.family, recipe.data, about,
                                             rows=recipe.model.vocab_size or made.vocab_size))


def open_data(recipe: Recipe, directory: str, *, verify: bool = False,
              ) -> tuple[Mixture, Split, Split | None, Facts | None]:
    """Opens the data of a run.

    Args:
      recipe: of the run.
      directory: of the prepared data.
      verify: hash every array against the manifest.

    Returns:
      the training rows; the held-out rows; those of the test examples, and what the task keeps of
      its training examples, each None if there is none.

    Raises:
      UserError: it is not prepared, prepared with another config, or damaged.
    """
    if not isinstance(recipe.task, Task):
        return *open_splits(recipe.data, directory, verify=verify), None, None
    vocab_size = recipe.model.vocab_size or prepared_tokenizer(directory).vocab_size
    train, others = open_examples(recipe.task, recipe.data, directory, sizes=sizes_of(recipe),
                                  vocab_size=vocab_size, verify=verify)
    return train, others["heldout"], others.get("test"), read_manifest(directory)["facts"]


def sizes_of(recipe: Recipe) -> Sizes:
    """The lengths of the rows of a task."""
    assert isinstance(recipe.task, Task)
    seq_len, model = recipe.data.seq_len, recipe.model
    if model.family == "encdec":
        return Sizes(recipe.task.target_len or seq_len, seq_len)
    return Sizes(seq_len, prefix=recipe.data.objective.name == "prefix_lm",
                 positions=model.max_positions if model.positions == "learned" else 0)
