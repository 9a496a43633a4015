"""All ways to decode with one set of options: sampling, beams, speculation, stop strings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lmjax.config import at_least, at_most, choice
from lmjax.data.tokenizers import NamedIds
from lmjax.decoding.beam import beam_search
from lmjax.decoding.generate import Generator
from lmjax.decoding.inputs import check_numbers, check_texts
from lmjax.decoding.sampling import Sampling
from lmjax.decoding.speculative import Draft, speculate
from lmjax.decoding.stopping import TextStream, cut
from lmjax.errors import UserError
from lmjax.nn.kv_cache import KV_CACHES
from lmjax.nn.module import Params

MAX_TOKENS = 1 << 24  # a larger number is a slip, and no cache of that many tokens fits anywhere


@dataclass(frozen=True)
class DecodingOptions:
    """How answers are made."""

    max_tokens: int = 64  # limit of an answer's length
    temperature: float = 0.8  # `temperature` to `repetition_penalty`: see `Sampling`
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | Sequence[str] = ()  # an answer ends before this string, or the first of several
    seed: int = 0  # of the random draws
    num_beams: int = 1  # above 1: beam search instead of sampling, see `beam_search`
    length_penalty: float = 1.0  # of beam search
    kv_cache: str = "float"  # how keys and values are kept: a row of `KV_CACHES`
    draft: Draft | None = None  # a small model with the same tokenizer that proposes tokens
    stream: Callable[[int, str], None] | None = None  # gets (row, next piece of its text) at once

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least(1, num_beams=self.num_beams, max_tokens=self.max_tokens)
        at_most(MAX_TOKENS, num_beams=self.num_beams, max_tokens=self.max_tokens,
                top_k=self.top_k)
        self.sampling.check()
        choice("kv_cache", self.kv_cache, KV_CACHES)
        if self.stream is not None and not callable(self.stream):
            raise UserError("a function of a row's number and a text", type(self.stream).__name__,
                            "pass one, such as lambda row, text: print(text)", "stream")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(check_texts(stops, "stop")))
        if "" in self.stop:
            raise UserError("strings that end an answer", "an empty one", "leave it out", "stop")
        # Beam search and speculation run in one program each, which returns whole answers.
        on = {"num_beams": self.num_beams > 1, "draft": self.draft, "stream": self.stream}
        asked = [name for name, value in on.items() if value]
        if len(asked) > 1:
            raise UserError("one of them", len(asked), "leave all but one out", ", ".join(asked))
        if self.num_beams > 1 and self.sampling != Sampling(self.temperature):
            raise UserError("no top_k, top_p, min_p or repetition_penalty with beams, which take "
                            "the likeliest answer", "one", "leave it out", "num_beams")

    @property
    def sampling(self) -> Sampling:
        """How the next token is drawn."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p,
                        self.repetition_penalty)


def answer(generator: Generator, params: Params, names: NamedIds,
           prompts: Sequence[Sequence[int]], options: DecodingOptions) -> list[str]:
    """Answers each prompt.

    Args:
      generator: the model.
      params: its parameters.
      names: its tokenizer.
      prompts: rows of token ids. An encoder-decoder reads them with its encoder.
      options: how the answers are made.

    Returns:
      One answer per prompt, without the prompt.

    Raises:
      UserError: a prompt is empty or too long, or has an id that the model has not.
    """
    o, generator = options, generator.with_kv_cache(options.kv_cache)
    if not prompts:
        return []
    # An encoder-decoder's answer is a text by itself.
    is_encdec = generator.model.config.family == "encdec"
    before: Sequence[Sequence[int]] = [()] * len(prompts) if is_encdec else prompts
    if o.num_beams > 1:
        ids = beam_search(generator, params, prompts, max_tokens=o.max_tokens,
                          num_beams=o.num_beams, length_penalty=o.length_penalty)
    elif o.draft:
        draft = o.draft._replace(model=o.draft.model.with_kv_cache(o.kv_cache))
        ids, _ = speculate(generator, params, draft, prompts, max_tokens=o.max_tokens,
                           sampling=o.sampling, seed=o.seed)
    else:
        watch = None
        if o.stop or o.stream:
            watch = TextStream(names, before, o.stop, o.stream)
        ids = generator(params, prompts, max_tokens=o.max_tokens, sampling=o.sampling,
                        seed=o.seed, watch=watch)
        if watch:
            return watch.finish(ids)
    return [cut(names.continuation(prompt, row), o.stop)[0]
            for prompt, row in zip(before, ids, strict=True)]
