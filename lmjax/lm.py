"""A trained model in two lines: `lm = lmjax.load(path)`, then `lm.score(texts)` or the like."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmjax import huggingface
from lmjax.config import choice, plain
from lmjax.config.paths import expand
from lmjax.data.reading import Reader, check_told, make_reader
from lmjax.data.tokenizers import Tokenizer
from lmjax.decoding.answers import DecodingOptions, answer
from lmjax.decoding.attention_maps import maps_of_text
from lmjax.decoding.chat import Speaker
from lmjax.decoding.explain import METHODS, Explanation, explain, question_of
from lmjax.decoding.generate import jit_on
from lmjax.decoding.inputs import check_array, check_ids, check_positions, check_text, check_texts
from lmjax.decoding.reading import generator_of
from lmjax.decoding.scoring import (
    POOLING,
    Score,
    TokenScore,
    draw_surprise,
    embeddings,
    likelihoods,
    states,
    token_likelihoods,
    total,
)
from lmjax.decoding.speculative import Draft
from lmjax.decoding.token_texts import labels, token_texts
from lmjax.errors import UserError
from lmjax.models.model import Model
from lmjax.nn.adapters import NO_ADAPTERS
from lmjax.nn.module import Params
from lmjax.reporting.model_card import write_export_card
from lmjax.runtime.files import new_directory
from lmjax.sharding import Layout
from lmjax.training.checkpoint import About, Checkpointer
from lmjax.training.frozen import held_by_checkpoints
from lmjax.training.plain_weights import merged, unpacked
from lmjax.training.pretrained import find
from lmjax.training.program import placed
from lmjax.training.recipe import Recipe
from lmjax.training.state import TrainState
from lmjax.training.task_model import TaskModel


class LM(TaskModel):
    """A trained model with its parameters and its tokenizer.

    Attributes:
      model: the architecture.
      params: its parameters, float32, on the devices of this process.
      layout: how the parameters are split over these devices.
      tokenizer: None for a model of synthetic data.
      reader: turns texts into ids as in the model's training; only with a tokenizer.
      recipe: of the run that trained it.
      about: what its checkpoint says of itself: step, versions, data position.
      source: its checkpoint, or its Hugging Face directory; "" for a model made by hand.
    """

    def __init__(self, model: Model, params: Params, layout: Layout, tokenizer: Tokenizer | None,
                 recipe: Recipe, about: About, source: str = ""):
        self.model, self.params, self.layout, self.source = model, params, layout, source
        self.tokenizer, self.recipe, self.about = tokenizer, recipe, about
        if tokenizer is not None:
            self.reader: Reader = make_reader(tokenizer, model.config.family, recipe.data, about,
                                              rows=model.config.vocab_size)
            self._generator = generator_of(model, layout, self.reader)
        whole = {"out_shardings": layout.replicated}
        self._score, self._rank = (jit_on(layout, functools.partial(
            likelihoods, model, ranks=ranks), **whole) for ranks in (False, True))
        self._states = jit_on(layout, functools.partial(states, model), **whole)
        self._logits = jit_on(layout, model.logits)

    def score(self, texts: Sequence[str], *, tokens: bool = False,
              picture: str | os.PathLike = "") -> list[Score]:
        """Scores each text as the beginning of a document.

        A text longer than the rows of training is read in rows of that length. Each row sees only
        itself, as in training and in evaluation, and every token counts once.

        Args:
          texts: any number of texts of any length.
          tokens: whether to score each token, too (`Score.by_token`).
          picture: a file (.png, .svg) for a drawing of one text's tokens by their surprise.

        Returns:
          One score per text.

        Raises:
          UserError: `texts` is no list of texts, or the model is no decoder or has no tokenizer.
        """
        texts = check_texts(texts, "texts")
        self.need_vocabulary()
        if picture and len(texts) != 1:
            raise UserError("one text for a picture", len(texts), "pass one", "texts")
        tokenizer, length = self.need_tokenizer(), self.recipe.data.seq_len
        encoded = tokenizer.encode_batch(texts)
        changed = tokenizer.changed(texts, encoded)
        ids = [[tokenizer.bos_id, *x.tolist()] for x in encoded]
        rows = [(i, x[at : at + length + 1])
                for i, x in enumerate(ids) for at in range(0, len(x) - 1, length)]
        nats = [0.0] * len(texts)
        by_token: list[list[tuple[float, int]]] = [[] for _ in texts]
        run = self._rank if tokens or picture else self._score
        scores = token_likelihoods(self.model, run, self.params,
                                   [(row, len(row) - 1) for _, row in rows])
        for (i, _), (log_p, rank) in zip(rows, scores, strict=True):
            nats[i] += total(log_p)
            if tokens or picture:
                by_token[i] += zip(log_p.tolist(), rank.tolist(), strict=True)
        found = [Score(n, len(x) - 1, len(changed.get(i, text).encode()), i in changed,
                       tuple(TokenScore(piece, *scored) for piece, scored in
                             zip(token_texts(tokenizer, x[1:]), by_token[i], strict=False)))
                 for i, (n, x, text) in enumerate(zip(nats, ids, texts, strict=True))]
        if picture:
            draw_surprise(labels(self.reader.names, ids[0][1:]), found[0].by_token, picture)
        return found

    def continuations(self, rows: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
        """Scores the last ids of each row, given the ids before them.

        A row's result does not depend on the other rows.

        Args:
          rows: (token ids, how many of the last ones to score). A prefix-LM reads the ids before
            those in both directions.

        Returns:
          Per row, the log-likelihood of the scored ids in nats, and whether each of them is the
          likeliest.

        Raises:
          UserError: the model is no decoder, a row is longer than its learned positions, an id is
            out of range, or a row has fewer ids than are to be scored after its first.
        """
        self.need_vocabulary()
        return [(total(log_p), bool((rank == 1).all()))
                for log_p, rank in token_likelihoods(self.model, self._score, self.params, rows)]

    def generate(self, prompts: Sequence[str], **options: Any) -> list[str]:
        """Continues each prompt; an encoder-decoder reads the prompt and writes an answer.

        An encoder-decoder's objective may have ids of its own. Prompts and answers name them:
        <extra_id_0> and so on.

        Args:
          prompts: any number of texts.
          options: fields of `DecodingOptions`, such as max_tokens=40 or temperature=0. `draft` is
            another LM.

        Returns:
          One answer per prompt, without the prompt.

        Raises:
          UserError: an option is out of range, two options do not go together, or the model has no
            tokenizer.
        """
        self.need_tokenizer()
        whole = self.model.config.family == "encdec"
        ids = [self.reader.ids(prompt, end=whole) for prompt in check_texts(prompts, "prompts")]
        return self.generate_ids(ids, **options)

    def generate_ids(self, prompts: Sequence[Sequence[int]], *, draft: "LM | None" = None,
                     **options: Any) -> list[str]:
        """Like `generate`, with prompts as rows of token ids."""
        tokenizer = self.need_tokenizer()
        if not isinstance(draft, LM | None):
            raise UserError("an LM", type(draft).__name__, "pass lmjax.load(path)", "draft")
        for model in (self, draft):
            if model is not None:
                model.need_vocabulary()
        drafting = Draft(draft.model, draft.params) if draft else None
        decoding = DecodingOptions(draft=drafting, **options)
        prompts = check_ids(prompts, self.model.config, "prompts")
        if "huggingface" in self.about:
            check_told(self.about["huggingface"])
        if draft and draft.need_tokenizer().hash != tokenizer.hash:
            raise UserError("a model with the same tokenizer", "another",
                            "train one on the same prepared data", "draft")
        return answer(self._generator, self.params, self.reader.names, prompts, decoding)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
        """Says what the assistant says next in a conversation, up to the end of its turn.

        Args:
          messages: what was said, each with a "role" (system, user, assistant) and a "content".
          options: fields of `DecodingOptions`, such as max_tokens=40 or temperature=0.
        Raises:
          UserError: no messages, a model without a chat template, or see `generate`.
        """
        return self.speaker(self.params, messages, **options)

    @functools.cached_property
    def speaker(self) -> Speaker:
        """What answers in conversations; raises a UserError without a chat template."""
        self.need_tokenizer()
        return Speaker(self.model, self.layout, self.reader, self.about.get("huggingface"))

    def embed(self, texts: Sequence[str], *, pooling: str = "mean",
              normalize: bool = True) -> np.ndarray:
        """Computes one vector per text from the last hidden states (of an encdec: its encoder's).

        Args:
          texts: any number of texts. A text longer than a row of training is cut.
          pooling: "mean" of the tokens' states, or the state of the "first" or the "last" token.
          normalize: whether to scale every vector to length 1.

        Returns:
          float32 [texts, D].

        Raises:
          UserError: `texts` is no list of texts, another `pooling`, or a model without a tokenizer.
        """
        choice("pooling", pooling, tuple(POOLING))
        texts = check_texts(texts, "texts")
        self.need_tokenizer()
        room = self.recipe.data.seq_len - len(self.reader.prefix) - len(self.reader.suffix)
        rows = check_ids([self.reader.ids(text, room) for text in texts], self.model.config,
                         "texts")
        return embeddings(self.model, self._states, self.params, rows, pooling, normalize)

    def attention_maps(self, text: str, *, picture: str | os.PathLike = "",
                       layer: int = -1) -> tuple[np.ndarray, list[str]]:
        """Computes how much each token of a text attends to each (in an encdec: in its encoder).

        Args:
          text: the text.
          picture: a file (.png, .svg) for a drawing of one layer; "" draws nothing.
          layer: which layer is drawn; negative numbers count from the last.

        Returns:
          The attention weights, float32 [layers, heads, T, T] (from, to), and the text's T tokens.

        Raises:
          UserError: `text` is no text or is longer than the model's learned positions, there is no
            such layer, or the model has no tokenizer.
        """
        text = check_text(text, "text")
        self.need_tokenizer()
        return maps_of_text(self.model, self.params, self.reader, text, picture, layer)

    def explain(self, text: str, answer: str = "", *, method: str = METHODS[0],
                picture: str | os.PathLike = "") -> Explanation:
        """Computes how much each token that the model reads adds to the likelihood of an answer.

        Args:
          text: what is read. In an encoder's text, masks such as [MASK] stand for tokens.
          answer: what follows in a decoder (by default the text itself is explained), the answer
            of an encoder-decoder, the tokens of an encoder's masks, or a classifier's class (by
            default the likeliest).
          method: "integrated_gradients" (arXiv:1703.01365) or "gradient_x_input".
          picture: a file (.png, .svg) for a drawing of the tokens by their values.

        Raises:
          UserError: there is nothing to explain, or the model has no tokenizer.
        """
        choice("method", method, METHODS)
        task = plain(self.recipe.task)
        known = [task.get(key, "") for key in ("name", "kind", "pair")]
        if self.model.config.head.outputs and known != ["classification", "single", ""]:
            raise UserError("a model of tokens, or a classifier of single texts", "another head",
                            "explain the model that its run started from", "lm.explain")
        text, answer = check_text(text, "text"), check_text(answer, "answer")
        self.need_tokenizer()
        question = question_of(self.model, self.reader, text, answer,
                               functools.partial(self._logits, self.params),
                               self.about.get("task", {}).get("labels", ()))
        found = explain(self.model, self.params, self.layout, self.reader, question, method)
        if picture:
            found.draw(picture)
        return found

    def logits(self, tokens_BT: jax.Array) -> jax.Array:
        """Computes the logits at every position, for scripts of your own.

        Args:
          tokens_BT: token ids, int32 [B, T].

        Returns:
          float32 [B, T, V].

        Raises:
          UserError: an id is out of range, a row is longer than the model's learned positions, or
            the model is an encoder-decoder, which reads two rows of ids.
        """
        if self.model.config.family == "encdec":
            raise UserError("a decoder or an encoder, which reads one row of ids", "an encdec",
                            "use lm.model.logits(lm.params, batch) with encoder_tokens and tokens")
        tokens = jnp.asarray(check_array(tokens_BT, self.model.config, "tokens"))
        check_positions(self.model.config, tokens.shape[1], "tokens")
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        batch = {"tokens": tokens, "positions": jnp.broadcast_to(positions, tokens.shape),
                 "segment_ids": jnp.ones_like(tokens)}
        return self._logits(self.params, batch)

    def save(self, out: str | os.PathLike) -> None:
        """Writes a checkpoint like those of a run: out/checkpoints/STEP/, which `load` reads.

        Of a model with adapters it holds these alone, and names the base that they are for.

        Raises:
          UserError: `out` exists already. A save that fails leaves nothing there.
        """
        with (new_directory(Path(expand(out, "out", bucket=False))) as part,
              contextlib.closing(Checkpointer(part / "checkpoints")) as checkpointer):
            held = held_by_checkpoints(self.recipe, self.model, self.params)
            checkpointer.save(TrainState(jnp.int32(self.about["step"]), held, {}, None), self.about)

    def merge(self) -> "LM":
        """Returns the same model without adapters: W + scale * A B in place of each weight W.

        Raises:
          UserError: the model has no adapters.
        """
        if not self.model.adapter.kind:
            raise UserError("a model with adapters", "one without", "use it as it is", "merge")
        return self._plain(merged, dataclasses.replace(self.recipe, adapter=NO_ADAPTERS))

    def dense(self) -> "LM":
        """Returns the same model with float32 weights in place of packed ones.

        Raises:
          UserError: its weights are not packed.
        """
        if not self.model.quantization.weights:
            raise UserError("a model with packed weights", "float32", "use it as it is", "dense")
        return self._plain(unpacked, self.recipe)

    def _plain(self, make: Callable[..., tuple[Model, Params, About]], recipe: Recipe) -> "LM":
        model, params, about = make(self.model, self.params, self.layout, self.about)
        return LM(model, params, self.layout, self.tokenizer, recipe, about, self.source)

    def export(self, out: str | os.PathLike, *, log: Callable[[str], None] = print,
               peft_base: str = "", **options: Any) -> None:
        """Writes a Hugging Face directory; adapters are merged into the weights.

        If the run that trained the model is at hand, a model card is written, too.

        Args:
          out: the directory, which must not exist yet.
          log: prints a line for the user.
          peft_base: writes the adapters alone, in the format of PEFT, for the base that
            transformers finds under this name or in this directory.
          options: fields of `lmjax.huggingface.ExportOptions`, such as dtype="bfloat16".

        Raises:
          UserError: `out` exists, or no Hugging Face model type computes the same.
        """
        path, imported = Path(expand(out, "out", bucket=False)), self.about.get("huggingface")
        if peft_base:
            huggingface.write_peft(path, self.model, self.params, base=peft_base, source=imported)
            log(f"{out}: the adapters alone, for {peft_base}")
        elif self.model.adapter.kind:
            log("the adapters are merged into the weights")
            return self.merge().export(out, log=log, **options)
        elif self.model.quantization.weights:
            log(f"the {self.model.quantization.weights} weights are unpacked")
            return self.dense().export(out, log=log, **options)
        else:
            huggingface.write_directory(
                path, self.model, self.params, None if self.tokenizer is None else self.reader,
                options=huggingface.ExportOptions(**options, head=self.task_head()),
                source=imported, max_positions=self.recipe.data.seq_len, log=log)
        if card := write_export_card(path, self.source, int(self.about["step"])):
            log(f"{card}: a model card; add a license and what the model is for")


def load(path: str | os.PathLike, *, step: int | str | None = None, ema: bool | None = None,
         base: str | os.PathLike = "") -> LM:
    """Loads a trained model onto the devices of this process, however many there are.

    Args:
      path: a run's directory, its `checkpoints` directory, one checkpoint, or a Hugging Face
        directory.
      step: which checkpoint of a run: a number, or "best" for the best evaluated one (by
        `eval.metric`); by default the newest.
      ema: whether to take the averaged weights; by default they are taken if the run kept them.
      base: where the weights are that adapters were trained for; "": where they were then.

    Raises:
      UserError: no checkpoint there, a damaged one, or a model that lmjax does not compute.
    """
    found = find(expand(path, "path"), step=step, ema=ema, base=base and expand(base, "base"))
    model, layout = placed(found.recipe, found.quantization)
    params = found.read(model, layout.tree(model.axes, model.shapes))
    return LM(model, params, layout, found.tokenizer, found.recipe, found.about, found.where)
