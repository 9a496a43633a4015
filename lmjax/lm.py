"""A trained model in two lines: `lm = lmjax.load(path)`, then `lm.score(texts)` or `lm.generate(prompts)`."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import huggingface
from lmjax.config import at_least, choice
from lmjax.data.objectives import ENCODER, START_ID, Objective
from lmjax.data.packing import Rows, fill_rows
from lmjax.data.tokenizers import NamedIds, Tokenizer
from lmjax.decoding.attention_maps import attention_maps, draw_attention
from lmjax.decoding.beam import beam_search
from lmjax.decoding.generate import Generator, bucket, jit_on
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.speculative import Draft, speculate
from lmjax.decoding.stopping import TextStream, cut
from lmjax.models.model import Batch, Model, build_model
from lmjax.nn.module import Params
from lmjax.runtime.files import new_directory
from lmjax.sharding import Layout, MeshConfig, make_layout, use_layout
from lmjax.training.checkpoint import About, Checkpointer
from lmjax.training.losses import log_likelihoods
from lmjax.training.pretrained import find
from lmjax.training.recipe import Recipe
from lmjax.training.state import TrainState

SCORE_ROWS = 16  # scored at a time, of long rows fewer:
SCORE_TOKENS = SCORE_ROWS * 1024  # as many as these are of
SCORE_LENGTH = 16  # positions of the shortest row that a program is compiled for
SCORE_LOGITS = 1 << 24  # float32 logits held at a time, 64 MiB (of one position of each row at least)
POOLING = {"mean": lambda x_TD: x_TD.mean(0), "first": lambda x_TD: x_TD[0], "last": lambda x_TD: x_TD[-1]}


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
        if tokenizer is not None:
            self._names, self._prefix, self._suffix, start_id = self._reading(tokenizer)
            self._generator = Generator(model, layout, eos_id=tokenizer.eos_id, vocab_size=self._names.vocab_size,
                                        start_id=start_id)
        self._score = jax.jit(self._token_log_likelihoods, out_shardings=layout.replicated)
        self._logits = jit_on(layout, model.logits)
        self._encode = jax.jit(lambda params, batch: model.encode(params, batch)[0][0],
                               out_shardings=layout.replicated)

    def score(self, texts: Sequence[str]) -> list[Score]:
        """The likelihood of each text as the beginning of a document.

        A text longer than the rows that the model was trained on is read in rows of that length, each
        seeing only itself, as in training and in evaluation: every token counts once.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a list of texts, got one text; write [text]")
        tokenizer, length = self.need_tokenizer(), self.recipe.data.seq_len
        ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
        pieces = [(i, x[at : at + length + 1]) for i, x in enumerate(ids) for at in range(0, len(x) - 1, length)]
        nats = [0.0] * len(texts)
        scores = self.continuations([(piece, len(piece) - 1) for _, piece in pieces])
        for (i, _), (value, _) in zip(pieces, scores, strict=True):
            nats[i] += value
        return [Score(n, len(x) - 1, len(t.encode())) for n, x, t in zip(nats, ids, texts, strict=True)]

    def continuations(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """For (token ids, n): the log-likelihood of the last n ids behind those before (a prefix-LM's prefix), and
        whether each of them is the likeliest."""
        if self.model.config.family != "decoder":
            raise ValueError(f"expected a decoder, which has likelihoods of texts, got an {self.model.config.family}; "
                             "use lm.embed or lm.model")
        by_size: dict[int, list[int]] = {}  # rows of a size by themselves, so that none depends on the others
        for i, (ids, _) in enumerate(rows):
            by_size.setdefault(bucket(len(ids) - 1, SCORE_LENGTH), []).append(i)
        out = [(0.0, True)] * len(rows)
        for size, members in sorted(by_size.items()):
            count = max(1, min(SCORE_ROWS, SCORE_TOKENS // size))  # by the size alone, so that no row's place matters
            for at in range(0, len(members), count):
                part = members[at : at + count]
                values, best = (np.asarray(x) for x in self._score(
                    self.params, self._batch([rows[i][0] for i in part], count, size,
                                             [len(rows[i][0]) - rows[i][1] for i in part])))
                for row, i in enumerate(part):
                    ids, n = rows[i]
                    span = slice(len(ids) - 1 - n, len(ids) - 1)
                    out[i] = float(values[row, span].sum(dtype=np.float64)), bool(best[row, span].all())
        return out

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """The text that follows each prompt (without it), or that a decoder writes for what its encoder reads; for the
        options see `generate_ids`. An encoder-decoder's objective has ids of its own: prompts and answers name them,
        <extra_id_0> and so on."""
        self.need_tokenizer()
        whole = self.model.config.family == "encdec"
        return self.generate_ids([self._ids(prompt, end=whole) for prompt in prompts], **options)

    def generate_ids(self, prompts: Sequence[Sequence[int]], *, max_tokens: int = 64, temperature: float = 0.8,
                     top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
                     stop: Sequence[str] = (), seed: int = 0, num_beams: int = 1, length_penalty: float = 1.0,
                     draft: "LM | None" = None, stream: Callable[[int, str], None] | None = None) -> list[str]:
        """The text that follows each row of token ids.

        Args:
          temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; temperature 0 takes the likeliest.
          stop: an answer ends before the first of these strings.
          num_beams, length_penalty: beam search instead of sampling, see `beam_search`.
          draft: a small model with the same tokenizer that proposes tokens, see `speculate`.
          stream: called with a row's number and its next piece of text, as it comes.
        Raises:
          ValueError: a setting out of range, or two that do not go together.
        """
        tokenizer = self.need_tokenizer()
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        at_least(1, num_beams=num_beams)
        # An encoder-decoder's answer is a text by itself.
        before = [()] * len(prompts) if self.model.config.family == "encdec" else prompts
        asked = [name for name, on in (("num_beams", num_beams > 1), ("draft", draft), ("stream", stream)) if on]
        if len(asked) > 1:  # with beams or a draft an answer is one program's
            raise ValueError(f"{', '.join(asked)}: expected one of them, got {len(asked)}; leave all but one out")
        if num_beams > 1 and sampling != Sampling(temperature):
            raise ValueError("num_beams: expected no top_k, top_p, min_p or repetition_penalty with beams, which take "
                             "the likeliest answer, got one; leave it out")
        if num_beams > 1:
            ids = beam_search(self._generator, self.params, prompts, max_tokens=max_tokens, num_beams=num_beams,
                              length_penalty=length_penalty)
        elif draft:
            if draft.need_tokenizer().hash != tokenizer.hash:
                raise ValueError("draft: expected a model with the same tokenizer, got another; train one on the same "
                                 "prepared data")
            ids, _ = speculate(self._generator, self.params, Draft(draft.model, draft.params), prompts,
                               max_tokens=max_tokens, sampling=sampling, seed=seed)
        else:
            watch = TextStream(self._names, before, stop, stream) if stop or stream else None
            ids = self._generator(self.params, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed,
                                  watch=watch)
            if watch:
                return watch.finish(ids)
        return [cut(self._names.continuation(b, i), stop)[0] for b, i in zip(before, ids, strict=True)]

    def embed(self, texts: Sequence[str], *, pooling: str = "mean", normalize: bool = True) -> np.ndarray:
        """float32 [texts, D]: a vector a text, from an encoder's last states or a decoder's (of both: the encoder's).

        pooling: the mean over its tokens, its "first" or its "last". Texts longer than a row are cut.
        """
        choice("pooling", pooling, POOLING)
        self.need_tokenizer()
        room = self.recipe.data.seq_len - len(self._prefix) - len(self._suffix)
        rows = [self._ids(text, room) for text in texts]
        out = np.zeros((len(rows), self.model.config.embed_dim), np.float32)
        for i, row in enumerate(rows):
            x_TD = np.asarray(self._encode(self.params, self._batch([[*row, 0]], 1, bucket(len(row), 16), [len(row)])),
                              np.float32)
            out[i] = POOLING[pooling](x_TD[: len(row)])
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if normalize else out

    def attention_maps(self, text: str, *, picture: str | os.PathLike = "",
                       layer: int = -1) -> tuple[np.ndarray, list[str]]:
        """float32 [layers, heads, T, T] and the text's T tokens: how much each looks at each, in an encoder-decoder's
        encoder.

        picture: a file (.png, .svg) for a drawing of one layer.
        """
        self.need_tokenizer()
        ids = self._ids(text)
        batch = {k: v[:, : len(ids)] for k, v in self._batch([[*ids, 0]], 1, len(ids), [len(ids)]).items()}
        maps = attention_maps(self.model, jax.device_put(self.params, jax.devices()[0]), batch)[:, 0]
        tokens = [self._names.decode([i]) or f"[{i}]" for i in ids]
        if picture:
            draw_attention(maps, tokens, picture, layer=layer)
        return maps, tokens

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """float32 logits [B, T, V] behind every one of the token ids int32 [B, T], for scripts of your own.

        Raises:
          ValueError: the model is an encoder-decoder, whose logits are of two rows of ids.
        """
        if self.model.config.family == "encdec":
            raise ValueError("expected a decoder or an encoder, which reads one row of ids, got an encdec; use "
                             "lm.model.logits(lm.params, batch) with encoder_tokens and tokens")
        tokens, size = jnp.asarray(tokens_BT, jnp.int32), self.model.config.vocab_size
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
            raise ValueError(f"tokens: expected ids of 0 to {size - 1:,}, got {int(tokens.min()):,} to "
                             f"{int(tokens.max()):,}; encode with lm.tokenizer")
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
        batch = {"tokens": tokens, "positions": positions, "segment_ids": jnp.ones_like(tokens)}
        return self._logits(self.params, batch)

    def save(self, out: str | os.PathLike) -> None:
        """Writes a checkpoint like those of a run, which `load` reads: out/checkpoints/<step>/.

        Raises:
          ValueError: `out` is there already. Nothing is left there by a save that fails.
        """
        with new_directory(Path(out)) as part, contextlib.closing(Checkpointer(part / "checkpoints")) as checkpointer:
            checkpointer.save(TrainState(jnp.int32(self.about["step"]), self.params, {}, None), self.about)

    def export(self, out: str | os.PathLike, *, model_type: str = "", dtype: str = "",
               max_shard_bytes: int = 5_000_000_000, log: Callable[[str], None] = print) -> None:
        """Writes a Hugging Face directory: `lmjax.huggingface.write_directory`, which says what it refuses."""
        huggingface.write_directory(Path(out), self.model, self.params, self.tokenizer, model_type=model_type,
                                dtype=dtype, max_shard_bytes=max_shard_bytes, source=self.about.get("huggingface"),
                                max_positions=self.recipe.data.seq_len, log=log)

    def _reading(self, tokenizer: Tokenizer) -> tuple[NamedIds, tuple[int, ...], tuple[int, ...], int]:
        """What is read and written besides the tokenizer's ids, what stands before and behind a text that is read, and
        what an encoder-decoder's decoder begins with: as in training, or as the import says."""
        imported = self.about.get("huggingface")
        if imported:
            told = [imported[part].get("decoder_start_token_id") for part in ("generation", "settings")]
            start_id = next((i for i in told if i is not None), tokenizer.pad_id)
            return NamedIds(tokenizer), tokenizer.prefix, tokenizer.suffix, start_id
        if self.model.config.family != "encdec":
            return NamedIds(tokenizer), tokenizer.prefix, tokenizer.suffix, START_ID
        data = self.recipe.data
        objective = Objective(data.objective, seq_len=data.seq_len, vocab_size=tokenizer.vocab_size)
        return NamedIds(tokenizer, objective.extra), (), (tokenizer.eos_id,), START_ID

    def _ids(self, text: str, room: int | None = None, *, end: bool = True) -> list[int]:
        """A text, cut to `room` tokens, as the model reads it. One that was never shown a beginning sees one where it
        would see nothing."""
        ids = [*self._prefix, *self._names.encode(text)[:room], *(self._suffix if end else ())]
        return ids or [self.tokenizer.bos_id]

    def _token_log_likelihoods(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with use_layout(self.layout):
            x_BTD, table_VD, bias_V, _ = self.model.hidden(params, batch)
            B, T = batch["targets"].shape
            chunk = min(T, 1 << max(SCORE_LOGITS // (B * len(table_VD)), 1).bit_length() - 1)  # T is a power of two
            return log_likelihoods(x_BTD, table_VD, batch["targets"], bias_V=bias_V,
                                   softcap=self.model.config.logit_softcap, chunk=chunk)

    def _batch(self, pieces: Sequence[Sequence[int]], rows: int, length: int, prompts: Sequence[int]) -> Rows:
        """Each piece a row of `length` tokens; its last token is only a target, its first `prompts` tokens are given:
        to a prefix-LM its prefix."""
        sizes = np.array([len(p) for p in pieces])
        batch = fill_rows(np.concatenate(pieces), np.cumsum(sizes) - sizes, sizes - 1, np.arange(len(pieces)), rows,
                          length)
        if self.model.prefix_lm:
            given_B = np.pad(np.asarray(prompts, np.int32), (0, rows - len(prompts)))
            batch["bidirectional"] = (batch["positions"] < given_B[:, None]).astype(np.int32)
        if self.model.config.family == "encdec":
            batch |= {name: batch[name.removeprefix("encoder_")] for name in ENCODER}
        return batch

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; a ValueError for a model without one."""
        if self.tokenizer is None:
            raise ValueError("expected a model with a tokenizer, got one of synthetic data, or imported without "
                             "tokenizer.model and tokenizer.json; use lm.logits(ids)")
        return self.tokenizer


def load(path: str | os.PathLike, *, step: int | None = None, ema: bool | None = None) -> LM:
    """Loads a run's directory, its `checkpoints` directory, one checkpoint, or a Hugging Face directory, on whatever
    devices there are.

    Args:
      step: which checkpoint of a run; the newest by default.
      ema: whether to take the averaged weights; by default they are taken if the run kept them.

    Raises:
      ValueError: no checkpoint there, a damaged one, or a model that lmjax does not compute.
    """
    found = find(path, step=step, ema=ema)
    model, layout = _placed(found.recipe)
    params = found.read(model, layout.tree(model.axes, model.shapes))
    return LM(model, params, layout, found.tokenizer, found.recipe, found.about)


def _placed(recipe: Recipe) -> tuple[Model, Layout]:
    """The recipe's model and where it goes on the devices of this process."""
    devices = jax.local_devices()
    platform = devices[0].platform
    config = dataclasses.replace(recipe.model, attention="auto")  # the run's kernel may be of other devices than these
    model = build_model(config, vocab_size=config.vocab_size, platform=platform, dtype=recipe.train.dtype(platform),
                        seq_len=recipe.data.seq_len, prefix_lm=recipe.data.objective.name == "prefix_lm")
    return model, _layout(model, len(devices), devices)


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
