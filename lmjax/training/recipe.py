"""What one run is: the config file, resolved into frozen dataclasses."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lmjax.config import at_least, build, choice, differences, plain
from lmjax.data import DataConfig
from lmjax.data.objectives import KINDS
from lmjax.decoding.sampling import Sampling
from lmjax.models.decoder import DecoderConfig
from lmjax.models.model import ModelConfig
from lmjax.models.presets import with_preset
from lmjax.nn.quantized import KINDS as KINDS_OF_MATMUL
from lmjax.sharding import MeshConfig
from lmjax.training.optim.config import OptimizerConfig
from lmjax.training.optim.schedules import make_schedule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    steps: optimizer steps. batch_size: rows a step, over all devices. microbatches: parts that a step's batch is
    computed in, one after the other, to need less memory. compute_dtype: of activations and matmuls; auto is bfloat16
    on TPU and GPU and float32 on CPU. matmul_dtype: int8 or fp8 for the layers' matmuls in training, or auto, the
    compute dtype. seed: of parameters and dropout. z_loss: coefficient of log(Z)^2. init_from: a run, a checkpoint or
    a Hugging Face directory whose weights the run starts from; "" for fresh ones. loss_chunk: positions whose logits
    exist at a time; 0 is all. log_every: steps between lines of metrics.jsonl.
    """

    steps: int = 1000
    batch_size: int = 16
    microbatches: int = 1
    compute_dtype: str = "auto"
    matmul_dtype: str = "auto"
    seed: int = 0
    z_loss: float = 0.0
    init_from: str = ""
    loss_chunk: int = 0
    log_every: int = 1

    def __post_init__(self) -> None:
        at_least(1, steps=self.steps, batch_size=self.batch_size, microbatches=self.microbatches,
                 log_every=self.log_every)
        if self.seed >= 1 << 32:
            raise ValueError(f"seed: expected less than 2^32, got {self.seed}; lower it")
        at_least(0, seed=self.seed, z_loss=self.z_loss, loss_chunk=self.loss_chunk)
        choice("compute_dtype", self.compute_dtype, ("auto", "float32", "bfloat16"))
        choice("matmul_dtype", self.matmul_dtype, ("auto", *KINDS_OF_MATMUL))
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches: expected a divisor of batch_size={self.batch_size}, got "
                             f"{self.microbatches}; change one of them")

    def dtype(self, platform: str) -> Any:
        """The compute dtype on `platform`."""
        auto = "float32" if platform == "cpu" else "bfloat16"
        return jnp.dtype(auto if self.compute_dtype == "auto" else self.compute_dtype)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation: every `every` steps (0: never) on `batches` batches (0: the whole held-out set),
    and on the whole set after the last step. batch_size: 0 takes the training one."""

    every: int = 0
    batches: int = 0
    batch_size: int = 0

    def __post_init__(self) -> None:
        at_least(0, every=self.every, batches=self.batches, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """A checkpoint every `every` steps and after the last; the newest `keep_last` stay, and each whose step
    is a multiple of `keep_every` (0: none). directory: where they go, a bucket (gs://, s3://) perhaps; empty: into the
    working directory."""

    directory: str = ""
    every: int = 100
    keep_last: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        at_least(1, every=self.every, keep_last=self.keep_last)
        at_least(0, keep_every=self.keep_every)

    def path(self, workdir: Path) -> str:
        """Where the checkpoints of a run in `workdir` are, as Orbax wants it."""
        if "://" in self.directory:
            return self.directory
        return str(Path(self.directory or workdir / "checkpoints").absolute())


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated every `every` steps (0: never) and after the last, from each of `prompts`."""

    every: int = 0
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
            raise ValueError('prompts: expected one or more, got none; write [""] for text from nothing, or every=0')


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """What is watched beside a run. profile: steps A:B, both included, that jax.profiler traces into WORKDIR/profile;
    empty: none. hlo: a directory for the step's HLO, before and after the compiler; empty: not written.
    stall_seconds: when nothing has moved for so long (setting up, compiling and saving have half an hour at least,
    preparing data a day), all stacks are written and the run ends; 0: never."""

    profile: str = ""
    hlo: str = ""
    stall_seconds: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, stall_seconds=self.stall_seconds)
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if self.profile and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise ValueError(f"profile: expected steps A:B from 1 on, A not after B, got {self.profile!r}; write 10:15")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A run, whole: everything that `lmjax train` reads besides the working directory."""

    model: ModelConfig = dataclasses.field(default_factory=DecoderConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.model.positions == "learned" and self.data.seq_len > self.model.max_positions:
            raise ValueError(f"data.seq_len: expected at most model.max_positions={self.model.max_positions}, got "
                             f"{self.data.seq_len}; raise max_positions or shorten the rows")
        objective, family = self.data.objective, self.model.family
        if objective.architecture != family:
            names = " or ".join(name for name, kind in KINDS.items() if kind.architecture == family)
            raise ValueError(f"data.objective.name: expected {names} for a model of the family {family}, got "
                             f"{objective.name}, which needs the family {objective.architecture}; change one of them")
        if self.sample.every and family != "decoder":
            raise ValueError("sample.every: expected 0, since only a decoder continues prompts, got "
                             f"{self.sample.every} for the family {family}; set 0")
        if self.watch.profile and int(self.watch.profile.split(":")[1]) > self.train.steps:
            raise ValueError(f"watch.profile: expected steps up to train.steps={self.train.steps}, got "
                             f"{self.watch.profile}; lower it or raise train.steps")
        chunk = self.train.loss_chunk
        if 0 < chunk < self.data.seq_len and self.data.seq_len % chunk:
            raise ValueError(f"train.loss_chunk: expected a divisor of data.seq_len={self.data.seq_len}, got {chunk}; "
                             "change it or set 0")


# What may differ when a run is resumed: where it runs, what is kept of it, and what the rows to come are.
MAY_CHANGE = ("mesh.", "eval.", "checkpoint.", "sample.", "watch.", "data.directory", "data.memory_limit_mib",
              "data.stages", "data.max_epochs.", "train.batch_size",  # rows trained on stay: see `run._restore`
              "data.curate.workers", "data.curate.memory_mib",
              "train.microbatches", "train.log_every", "model.attention", "model.remat", "model.scan_layers",
              "train.loss_chunk",
              "train.compute_dtype")  # of which a checkpoint records what became: "auto" may be spelt out, not changed


# May differ where every learning rate so far is what it was: a run trained on for longer, or decayed from where it is.
SCHEDULE = ("train.steps", "optimizer.schedule", "optimizer.final_lr_fraction", "optimizer.decay_fraction")
OBJECTIVE = {"encoder": "masked_lm", "encdec": "span_corruption"}  # of families, where the config does not say


def build_recipe(mapping: Mapping[str, Any]) -> Recipe:
    """The strict `Recipe` of a config file's plain dict; `model.preset` stands for that preset's keys, and where the
    objective has no name it is the family's own."""
    mapping = mapping if isinstance(mapping, Mapping) else plain(mapping)  # a ConfigDict is no Mapping
    model = mapping.get("model")
    if isinstance(model, Mapping):
        model = with_preset(model)
        mapping = {**mapping, "model": model}
        data = mapping.get("data", {})
        objective = data.get("objective", {}) if isinstance(data, Mapping) else None
        if isinstance(objective, Mapping) and model.get("family") in OBJECTIVE:
            mapping["data"] = {**data, "objective": {"name": OBJECTIVE[model["family"]], **objective}}
    return build(Recipe, mapping)


def blocking_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """(changes that would make a resumed run another run, changes that are fine), as `key: old -> new`. Of SCHEDULE the
    learning rates decide: `check_schedule`."""
    changes = differences(old, new)
    may = (*MAY_CHANGE, *SCHEDULE)
    fine = [c for c in changes if any(c.startswith(m if m.endswith(".") else f"{m}:") for m in may)]
    return [c for c in changes if c not in fine], fine


def check_schedule(old: Recipe, new: Recipe, step: int) -> None:
    """Refuses a `new` recipe under which the first `step` steps would have had other learning rates.

    Raises:
      ValueError: they would; it names what changed.
    """
    before, now = (make_schedule(r.optimizer, r.train.steps)(np.arange(step)) for r in (old, new))
    if not np.array_equal(before, now):
        changed = [c for c in differences(plain(old), plain(new)) if c.split(":")[0] in SCHEDULE]
        raise ValueError(f"expected the learning rates that the first {step} steps had, got {'; '.join(changed)}, "
                         "which changes them; undo that, or go on in another --workdir with "
                         "train.init_from")
