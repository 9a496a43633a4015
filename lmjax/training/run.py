"""A run that is ready for its next step: what `setup.set_up` makes and the loop trains."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lmjax.data.order import Steps
from lmjax.data.pipeline import Mixture, Split
from lmjax.data.reading import Reader, make_reader
from lmjax.data.tokenizers import Tokenizer
from lmjax.decoding.generate import Generator
from lmjax.decoding.reading import generator_of
from lmjax.models.model import Model
from lmjax.monitoring.health import Health
from lmjax.sharding import Layout
from lmjax.tasks.task import Facts
from lmjax.tasks.writing import WritingTask
from lmjax.training.best import Best, write_best
from lmjax.training.checkpoint import Checkpointer
from lmjax.training.pretrained import Pretrained
from lmjax.training.program import Program
from lmjax.training.recipe import Recipe
from lmjax.training.saved import Saved
from lmjax.training.saving import Saver
from lmjax.training.state import StateSpec, TrainState
from lmjax.training.step import StepFn

Log = Callable[[str], None]


@dataclasses.dataclass
class Run:
    """A recipe with its program, its data, its files and its state."""

    recipe: Recipe
    workdir: Path
    program: Program
    train_split: Mixture
    heldout: Split
    tokenizer: Tokenizer | None  # None on synthetic data
    generator: Generator | None  # None without a tokenizer, or with the head of a task
    checkpointer: Checkpointer
    saver: Saver
    about: dict[str, Any]  # what every checkpoint of the run records, besides its own step
    steps: Steps  # which rows of the data each step takes
    facts: Facts | None = None  # of the task's training examples; None without a task
    test: Split | None = None  # examples that are evaluated once, after the last step
    state: TrainState | None = None  # None while the loop owns it
    start: int = 0  # the step that this start goes on from
    tokens: int = 0  # trained on before this start
    unfinished: bool = False  # the step `start` was saved before it was evaluated
    best: Best = dataclasses.field(default_factory=Best)  # by eval.metric
    saved: Saved = dataclasses.field(default_factory=Saved)  # what saved.json holds
    restore_seconds: float = 0.0  # spent on reading the checkpoint; 0: there was none
    compiled: StepFn | None = None  # the train step, once the loop has started
    compiled_with_statistics: StepFn | None = None  # the same, once it was needed
    source: Pretrained | None = None  # the model that a new run starts from
    teacher: Pretrained | None = None  # of a distillation
    health: Health = dataclasses.field(default_factory=Health)  # of the steps so far
    rewinds: int = 0  # to the step `start`

    def takes_statistics(self, step: int) -> bool:
        """Whether statistics by module are taken in `step`."""
        every = self.recipe.watch.statistics_every
        return every > 0 and step % every == 0

    def step_of(self, step: int) -> StepFn:
        """The compiled function of a step; the one with statistics is compiled when first used."""
        assert self.compiled is not None
        if not self.takes_statistics(step):
            return self.compiled
        if self.compiled_with_statistics is None:
            self.compiled_with_statistics = self.program.trace_with_statistics().lower().compile()
        return self.compiled_with_statistics

    def data_state(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint after `step` steps records of the data.

        That is the row to go on from, the changes of batch size, and the fingerprint of the data.
        """
        state = self.steps.state(step)
        return {"fingerprint": self.train_split.fingerprint_of(state["next_row"]), **state}

    def note(self, **changed: int) -> None:
        """Changes fields of `saved` on every process; process 0 writes saved.json.

        A rewind decides from them what to repeat, and all processes have to decide the same.
        """
        self.saved = Saved(**(dataclasses.asdict(self.saved) | changed))
        if jax.process_index() == 0:
            self.saved.write(self.workdir)

    def remember(self, best: Best) -> None:
        """Makes `best` the run's best; if the recipe keeps it, its checkpoint stays from now on."""
        self.best = best
        if self.recipe.checkpoint.keep_best:
            self.checkpointer.kept = best.step
        if best.metric and jax.process_index() == 0:
            write_best(self.checkpointer.directory, best)

    def best_of(self, step: int, state: TrainState) -> TrainState:
        """The state with the weights to test: those of the best step, if its checkpoint is kept.

        Args:
          step, state: of the run, at its end.

        Raises:
          UserError: the checkpoint is not there, or is damaged.
        """
        best = self.best.step
        if not (self.recipe.checkpoint.keep_best and best) or best == step:
            return state
        self.saver.settle()
        return self.checkpointer.with_weights_of(best, self.spec, state)

    @functools.cached_property
    def reader(self) -> Reader:
        """How the model reads texts; only with a tokenizer, once the run has its first state."""
        assert self.tokenizer is not None
        config = self.model.config
        return make_reader(self.tokenizer, config.family, self.recipe.data, self.about,
                           rows=config.vocab_size)

    @functools.cached_property
    def writer(self) -> Generator:
        """What writes the answers of a task."""
        assert isinstance(self.recipe.task, WritingTask)
        return generator_of(self.model, self.layout, self.reader,
                            self.recipe.task.ends(self.reader).ids)

    @property
    def out_of_patience(self) -> bool:
        """Whether the run ends early: so many evaluations have found nothing better."""
        return 0 < self.recipe.eval.patience <= self.best.waited

    @property
    def layout(self) -> Layout:
        """The mesh, and how arrays are placed on it."""
        return self.program.layout

    @property
    def model(self) -> Model:
        """The model; its parameters are in `state`."""
        return self.program.model

    @property
    def spec(self) -> StateSpec:
        """Shapes and shardings of the state."""
        return self.program.spec

    @property
    def prompts(self) -> list[list[int]]:
        """Token ids of the prompts that the run samples from; without a tokenizer none."""
        if self.tokenizer is None:
            return []
        return [[self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
                for prompt in self.recipe.sample.prompts]
