"""A trained model in two lines: `lm = lmjax.load(path)`, then `lm.score(texts)` or `lm.generate(prompts)`."""

import base64
import dataclasses
import math
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from lmjax.checkpoint import About, checkpoint_steps, read_about, restore_params
from lmjax.data.packing import Rows, fill_rows
from lmjax.data.tokenizer import Tokenizer
from lmjax.generate import Generator, Sampling
from lmjax.losses import log_likelihoods
from lmjax.models import Batch, Model, build_model
from lmjax.nn.module import Params
from lmjax.recipe import Recipe, build_recipe
from lmjax.sharding import Layout, MeshConfig, make_layout, use_layout

SCORE_ROWS = 16  # scored at a time
SCORE_LENGTH = 16  # positions of the shortest row that a program is compiled for
SCORE_LOGITS = 1 << 24  # float32 logits held at a time, 64 MiB (of one position of each row at least)


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of a text. log_likelihood: nats, the sum over `tokens`. bytes: of UTF-8."""

    log_likelihood: float
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """-log2 likelihood for every byte of text."""
        return -self.log_likelihood / math.log(2) / max(self.bytes, 1)

    @property
    def perplexity(self) -> float:
        """exp of the mean -log likelihood of a token."""
        return math.exp(-self.log_likelihood / max(self.tokens, 1))


class LM:
    """A model with its parameters and tokenizer.

    Attributes: model, params (placed on all devices of this process), tokenizer (None for synthetic data),
    recipe (of the run), about (of the checkpoint: step, versions, data position).
    """

    def __init__(self, model: Model, params: Params, layout: Layout, tokenizer: Tokenizer | None, recipe: Recipe,
                 about: About):
        self.model, self.params, self.layout = model, params, layout
        self.tokenizer, self.recipe, self.about = tokenizer, recipe, about
        self._generator = (None if tokenizer is None else
                           Generator(model, layout, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size))
        self._score = jax.jit(self._token_log_likelihoods, out_shardings=layout.replicated)

    def score(self, texts: Sequence[str]) -> list[Score]:
        """The likelihood of each text as the beginning of a document.

        A text longer than the rows that the model was trained on is read in rows of that length, each
        seeing only itself, as in training and in evaluation: every token counts once.
        """
        tokenizer = self._need_tokenizer()
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        length = self.recipe.data.seq_len
        pieces = [(i, x[at : at + length + 1]) for i, x in enumerate(ids) for at in range(0, len(x) - 1, length)]
        nats = [0.0] * len(texts)
        for at in range(0, len(pieces), SCORE_ROWS):
            part = pieces[at : at + SCORE_ROWS]
            values = np.asarray(self._score(self.params, _padded([p for _, p in part], SCORE_ROWS)))
            for row, (i, piece) in enumerate(part):
                nats[i] += float(values[row, : len(piece) - 1].sum(dtype=np.float64))
        return [Score(n, len(x) - 1, len(t.encode())) for n, x, t in zip(nats, ids, texts, strict=True)]

    def generate(self, prompts: Sequence[str], *, max_tokens: int = 64, temperature: float = 0.8, top_k: int = 0,
                 top_p: float = 1.0, seed: int = 0) -> list[str]:
        """The text that follows each prompt (without it). temperature 0 takes the likeliest token each time."""
        tokenizer = self._need_tokenizer()
        ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
        answers = self._generator(self.params, ids, max_tokens=max_tokens,
                                  sampling=Sampling(temperature, top_k, top_p), seed=seed)
        return [tokenizer.decode(answer) for answer in answers]

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] behind every one of the token ids int32 [B, T], for scripts of your own."""
        tokens = jnp.asarray(tokens_BT, jnp.int32)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
        return self.model.logits(self.params, batch)

    def _token_log_likelihoods(self, params: Params, batch: Batch) -> jax.Array:
        with use_layout(self.layout):
            x_BTD, table_VD, bias_V, _ = self.model.hidden(params, batch)
            B, T = batch["targets"].shape
            chunk = min(T, 1 << max(SCORE_LOGITS // (B * len(table_VD)), 1).bit_length() - 1)  # T is a power of two
            return log_likelihoods(x_BTD, table_VD, batch["targets"], bias_V=bias_V,
                                   softcap=self.model.config.logit_softcap, chunk=chunk)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError("expected a model with a tokenizer, got one trained on synthetic data; use lm.logits(ids)")
        return self.tokenizer


def load(path: str | os.PathLike, *, step: int | None = None, ema: bool | None = None) -> LM:
    """Loads a run's directory, its `checkpoints` directory or one checkpoint, on whatever devices there are.

    Args:
      step: which checkpoint of a run; the newest by default.
      ema: whether to take the averaged weights; by default they are taken if the run kept them.

    Raises:
      ValueError: no checkpoint there, or a damaged one.
    """
    where = epath.Path(path)
    if "://" not in str(path):
        where = where.expanduser().absolute()  # Orbax takes no relative path
    where = _find(where, step)
    about = read_about(where)
    recipe = build_recipe(about["recipe"])
    devices = jax.local_devices()
    platform = devices[0].platform
    model = build_model(recipe.model, vocab_size=recipe.model.vocab_size, platform=platform,
                        dtype=recipe.train.dtype(platform), seq_len=recipe.data.seq_len)
    has_ema = "ema" in about["checksums"]
    if ema and not has_ema:
        raise ValueError(f"{where}: expected averaged weights, got a run with optimizer.ema_decay=0; leave ema out")
    layout = _layout(model, len(devices), devices)
    shardings = layout.tree(model.axes, model.shapes)
    shapes = jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), model.shapes, shardings)
    params = restore_params(where, shapes, name="ema" if (has_ema if ema is None else ema) else "params")
    tokenizer = Tokenizer.from_bytes(base64.b64decode(about["tokenizer"])) if about["tokenizer"] else None
    return LM(model, params, layout, tokenizer, recipe, about)


def _find(path: epath.Path, step: int | None) -> epath.Path:
    if (path / "about").exists():
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    steps = checkpoint_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"{path}: expected {'a checkpoint' if step is None else f'checkpoint {step}'}, got "
                         f"{steps or 'none'}; pass a run's directory, or one checkpoint of it")
    return directory / str(steps[-1] if step is None else step)


def _layout(model: Model, count: int, devices: Sequence[jax.Device]) -> Layout:
    """Weights split over all devices where that goes evenly, whole on each otherwise."""
    for config in (MeshConfig(data=1, fsdp=count, rules={"batch": ()}), MeshConfig(data=count, rules={"batch": ()})):
        layout = make_layout(config, devices)
        try:
            layout.tree(model.axes, model.shapes)
            break
        except ValueError:
            continue
    return layout


def _padded(pieces: Sequence[Sequence[int]], rows: int) -> Rows:
    """Each piece a row, as long as a power of two; its last token is only a target."""
    sizes = np.array([len(p) for p in pieces])
    length = 1 << max(int(sizes.max()) - 2, SCORE_LENGTH - 1).bit_length()
    return fill_rows(np.concatenate(pieces), np.cumsum(sizes) - sizes, sizes - 1, np.arange(len(pieces)),
                     np.zeros_like(sizes), rows, length)
