"""Recipes: a config file, resolved into frozen dataclasses.

A `Recipe` says everything about a run but where it is written. `program.make_program` makes what is
compiled out of it, `setup.set_up` a run, and `loop.train` a trained model.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lmjax.config import (
    LocalPathText,
    PathText,
    at_least,
    build,
    choice,
    expand_paths,
    pattern,
    plain,
)
from lmjax.config.paths import is_bucket
from lmjax.data.config import DataConfig
from lmjax.data.objectives import OBJECTIVES
from lmjax.decoding.sampling import Sampling
from lmjax.errors import UserError
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import ModelConfig
from lmjax.models.parametrization import check_optimizer
from lmjax.models.presets import with_preset
from lmjax.monitoring.health import SPIKES
from lmjax.nn.adapters import AdapterConfig
from lmjax.nn.packed import NOT_QUANTIZED, Quantization
from lmjax.nn.quantized import MATMUL_DTYPES
from lmjax.sharding import MeshConfig
from lmjax.tasks.distillation import DistillConfig, check_task
from lmjax.tasks.table import AnyTask, LanguageModeling
from lmjax.tasks.task import Task
from lmjax.training.best import HIGHER_IS_BETTER
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.schedules import SCHEDULES
from lmjax.training.optim.table import OPTIMIZERS
from lmjax.training.pruning import PruningConfig

# The objective of a family whose recipe names none; a decoder's is DataConfig's default.
DEFAULT_OBJECTIVES = {"encoder": "masked_lm", "encdec": "span_corruption"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop and the step."""

    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # rows per step, over all devices
    microbatches: int = 1  # parts of a batch, computed one after the other to need less memory
    compute_dtype: str = "auto"  # of activations and matmuls; auto: bfloat16, on CPU float32
    matmul_dtype: str = "auto"  # of the layers' matmuls: int8, fp8, or auto, the compute dtype
    seed: int = 0  # of parameters and dropout
    z_loss: float = 0.0  # coefficient of log(Z)^2
    # The model whose weights the run starts from: the directory of a run, of a checkpoint or of a
    # Hugging Face model; "": random weights.
    init_from: PathText = ""
    # Whether rope_theta and rope_scaling may differ from those of init_from, for longer rows.
    change_rope: bool = False
    # Whether the model may be smaller than init_from: it begins with some of its layers, evenly
    # chosen, and with the first entries of every other axis.
    shrink: bool = False
    # A regular expression: parameters in whose path it is found keep their values and have neither
    # gradients nor optimizer state, for example ^embedding/|layers/.*norm; "": all are trained.
    frozen: str = ""
    keep_zeros: bool = False  # elements of matrices that are exactly 0 stay so: after pruning
    loss_chunk: int = 0  # positions whose logits exist at a time; 0: all
    log_every: int = 1  # steps per line of metrics.jsonl

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size, microbatches=self.microbatches,
                 log_every=self.log_every)
        if self.seed >= 1 << 32:
            raise UserError("less than 2^32", self.seed, "lower it", where="seed")
        at_least(0, seed=self.seed, z_loss=self.z_loss, loss_chunk=self.loss_chunk)
        pattern("frozen", self.frozen)
        choice("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        choice("matmul_dtype", self.matmul_dtype, ("auto", *MATMUL_DTYPES))
        if self.batch_size % self.microbatches:
            raise UserError(f"a divisor of batch_size={self.batch_size}", self.microbatches,
                            "change one of them", where="microbatches")

    def dtype(self, platform: str) -> Any:
        """Returns the compute dtype on `platform`."""
        auto = "float32" if platform == "cpu" else "bfloat16"
        return jnp.dtype(auto if self.compute_dtype == "auto" else self.compute_dtype)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation. After the last step, the whole held-out set is evaluated in any case."""

    every: int = 0  # steps between evaluations; 0: none
    batches: int = 0  # per evaluation; 0: the whole held-out set
    batch_size: int = 0  # 0: that of training
    # The metric by which steps are better or worse, e.g. loss; "": none. Of the averaged weights,
    # if the run keeps an average.
    metric: str = ""
    patience: int = 0  # evaluations without a better `metric` after which the run ends; 0: never

    def __post_init__(self) -> None:
        at_least(0, every=self.every, batches=self.batches, batch_size=self.batch_size,
                 patience=self.patience)
        if self.metric:
            choice("metric", self.metric, HIGHER_IS_BETTER)
        if self.patience and not self.metric:
            raise UserError("a metric to be patient with", "none", "set eval.metric=loss, or "
                            "patience=0", where="patience")
        if self.metric and not self.every:
            raise UserError("more than 0, since eval.metric is set", 0,
                            "set how many steps lie between evaluations", where="every")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, besides the one after the last step, and which are kept."""

    directory: PathText = ""  # a directory or a bucket (gs://); "": WORKDIR/checkpoints
    every: int = 100  # steps between checkpoints
    keep_last: int = 2  # how many of the newest are kept
    keep_every: int = 0  # those at multiples of so many steps are kept as well; 0: none
    keep_best: bool = False  # the best evaluated step, by eval.metric, is saved and kept as well
    # The step of a lost checkpoint that is given up: the run goes on from the newest that is left,
    # or begins anew. Ignored while that checkpoint, or a later one, is there.
    abandon: int = 0
    # Seconds in which saves may fail before the run ends: it goes on, and tries again. 0: none.
    patience_seconds: float = 1800.0

    def __post_init__(self) -> None:
        at_least(1, every=self.every, keep_last=self.keep_last)
        at_least(0, keep_every=self.keep_every, abandon=self.abandon,
                 patience_seconds=self.patience_seconds)

    def path(self, workdir: Path) -> str:
        """Returns where the checkpoints of a run in `workdir` are: a URL or an absolute path."""
        if is_bucket(self.directory):
            return self.directory
        return str(Path(self.directory or workdir / "checkpoints").absolute())


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated from each of `prompts` while training goes on, and after the last step."""

    every: int = 0  # steps between samples; 0: none, not after the last step either
    prompts: tuple[str, ...] = ("",)
    max_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        at_least(0, every=self.every)
        at_least(1, max_tokens=self.max_tokens)
        Sampling(self.temperature, self.top_k, self.top_p).check()
        if self.every and not self.prompts:
            raise UserError("one or more", "none", 'write [""] for text from nothing, or every=0',
                            where="prompts")


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is watched beside a run."""

    # Steps A:B, both included, that jax.profiler traces into WORKDIR/profile; "": none.
    profile: str = ""
    # A directory for the step's HLO, before and after compilation; "": not written.
    hlo: LocalPathText = ""
    # A run that has not moved for so long ends with the stacks of all threads; 0: never. Setting
    # up, compiling and saving may take half an hour in any case, preparing data a day.
    stall_seconds: float = 0.0
    # A step whose loss or gradient norm is not finite changes nothing. After so many consecutive
    # ones, the run goes back to its last checkpoint and leaves their rows out; 0: never.
    rewind_after: int = 5
    # What a loss or a gradient norm far above the usual leads to: off, record, skip (the step
    # changes nothing), or rewind.
    spikes: str = "record"
    # Steps between comparisons of the devices that hold the same weights, moments and averages; 0:
    # none. With it, every state is compared before it is saved.
    compare_every: int = 0
    # Steps between statistics by module and layer, which a second compiled step gives; 0: none. On
    # several devices these steps may round in another way than the others.
    statistics_every: int = 0

    def __post_init__(self) -> None:
        at_least(0, stall_seconds=self.stall_seconds, rewind_after=self.rewind_after,
                 compare_every=self.compare_every, statistics_every=self.statistics_every)
        choice("spikes", self.spikes, SPIKES)
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if self.profile and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise UserError("steps A:B from 1 on, A not after B", repr(self.profile), "write 10:15",
                            where="profile")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that `lmjax train` reads besides the working directory."""

    model: ModelConfig = dataclasses.field(default_factory=DecoderConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    quantization: Quantization = NOT_QUANTIZED  # that the training prepares the model for
    pruning: PruningConfig = dataclasses.field(default_factory=PruningConfig)
    task: AnyTask = dataclasses.field(default_factory=LanguageModeling)  # of fine-tuning

    def __post_init__(self) -> None:
        choice("optimizer.name", self.optimizer.name, OPTIMIZERS)
        choice("optimizer.schedule", self.optimizer.schedule, SCHEDULES)
        check_optimizer(self.model, self.optimizer.name)
        if self.train.shrink and self.model.parametrization != "standard":
            raise UserError("false, since the multipliers of a model of other sizes differ", True,
                            "start without shrink", where="train.shrink")
        family, objective, seq_len = self.model.family, self.data.objective, self.data.seq_len
        if self.model.positions == "learned" and seq_len > self.model.max_positions:
            raise UserError(f"at most model.max_positions={self.model.max_positions}", seq_len,
                            "raise max_positions or shorten the rows", where="data.seq_len")
        if objective.architecture != family:
            names = " or ".join(n for n, kind in OBJECTIVES.items() if kind.architecture == family)
            raise UserError(f"{names} for a model of the family {family}", f"{objective.name}, "
                            f"which needs the family {objective.architecture}",
                            "change one of them", where="data.objective.name")
        self._check_task()
        if self.adapter.kind and self.quantization.weights:
            raise UserError("no adapters, which are merged before weights are packed", "adapters",
                            "train them without, merge, then lmjax compress",
                            where="config.quantization.weights")
        if self.adapter.kind and self.train.keep_zeros:
            raise UserError("false with adapters, which begin with zeros", True, "leave it out",
                            where="train.keep_zeros")
        self._check_pruning()
        if self.sample.every and family != "decoder":
            raise UserError("0, since only a decoder continues prompts",
                            f"{self.sample.every} for the family {family}", "set 0",
                            where="sample.every")
        if self.watch.profile and int(self.watch.profile.split(":")[1]) > self.train.steps:
            raise UserError(f"steps up to train.steps={self.train.steps}", self.watch.profile,
                            "lower it or raise train.steps", where="watch.profile")
        if self.checkpoint.keep_best and not self.eval.metric:
            raise UserError("false, since eval.metric names no metric", True,
                            "set eval.metric=loss, for example", where="checkpoint.keep_best")
        self._check_chunk(seq_len)
        if self.distill.teacher:
            check_task(self.task)

    def _check_pruning(self) -> None:
        if not self.pruning.weights:
            return
        self.pruning.last(self.train.steps)
        if self.adapter.kind:
            raise UserError("0 with adapters, which begin with zeros", self.pruning.weights,
                            "merge them, then prune", where="pruning.weights")
        if self.optimizer.ema_decay:
            raise UserError("0 with optimizer.ema_decay, whose averages would not be 0",
                            self.pruning.weights, "set ema_decay=0", where="pruning.weights")

    def _check_task(self) -> None:
        """Refuses a model, a metric or samples that the task has no use for."""
        measures: tuple[str, ...] = ("bits_per_byte",)
        if isinstance(self.task, Task):
            self.task.check(self.model)
            measures = self.task.measures
            if self.train.batch_size % self.task.samples:
                raise UserError(f"a multiple of task.group={self.task.samples}",
                                self.train.batch_size, "change one of them",
                                where="train.batch_size")
            if self.task.whole_batch and self.train.microbatches > 1:
                raise UserError(f"1 for {self.task.name}, which compares all rows of a batch",
                                self.train.microbatches, "lower it", where="train.microbatches")
            if self.sample.every and not self.task.writes:
                raise UserError(f"0 for {self.task.name}, which writes no text", self.sample.every,
                                "set 0", where="sample.every")
        if self.eval.metric:
            choice("eval.metric", self.eval.metric, ("loss", "perplexity", *measures))

    def _check_chunk(self, seq_len: int) -> None:
        chunk = self.train.loss_chunk
        if 0 < chunk < seq_len and seq_len % chunk:
            raise UserError(f"a divisor of data.seq_len={seq_len}", chunk, "change it or set 0",
                            where="train.loss_chunk")


def build_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """Makes a `Recipe` from a config file's dict, strictly.

    `model.preset` stands for the keys of that preset. An objective without a name is the family's.
    Paths are expanded.

    Raises:
      UserError: an unknown key, a wrong type, a path that cannot be meant, or values that do not go
        together.
    """
    return expand_paths(_recipe(mapping))


def recorded_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """Makes a `Recipe` from what a run or a checkpoint has recorded: its paths stay as they are.

    Raises:
      UserError: as `build_recipe`, but for paths.
    """
    recipe = _recipe(mapping)
    objective = recipe.data.objective
    if objective.marks and "own_ids" not in mapping.get("data", {}).get("objective", {}):
        objective = dataclasses.replace(objective, own_ids=False)  # a record of version 0.1.0
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, objective=objective))


def _recipe(mapping: Mapping[str, Any]) -> Recipe:
    mapping = mapping if isinstance(mapping, Mapping) else plain(mapping)  # a ConfigDict is none
    model = mapping.get("model")
    if isinstance(model, Mapping):
        model = with_preset(model)
        mapping = {**mapping, "model": model}
        data = mapping.get("data", {})
        objective = data.get("objective", {}) if isinstance(data, Mapping) else None
        default = DEFAULT_OBJECTIVES.get(model.get("family", ""))
        if default and isinstance(objective, Mapping):
            mapping["data"] = {**data, "objective": {"name": default, **objective}}
    return build(Recipe, mapping)
