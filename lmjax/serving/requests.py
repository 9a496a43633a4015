"""What goes into the engine and what comes out of it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lmjax.config import at_least, at_most, scalar
from lmjax.decoding.inputs import check_row
from lmjax.decoding.sampling import PLAIN, Sampling
from lmjax.errors import UserError
from lmjax.models.model import ModelConfig

MAX_ALTERNATIVES = 20  # likeliest tokens that are reported beside each token, at most
MAX_STOPS = 16  # tokens that a request may name as ends of its answer
MAX_BIAS = 300  # tokens whose logits a request may change, as in the OpenAI API


@dataclass(frozen=True)
class Request:
    """A prompt, and how it is to be answered."""

    prompt: tuple[int, ...]
    max_tokens: int  # limit of the answer's length; 0 only with `echo_scores`
    sampling: Sampling = PLAIN
    seed: int = 0  # of the random draws, modulo 2**31
    alternatives: int = 0  # how many of the likeliest tokens are reported beside each token
    bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these ids
    stop_ids: tuple[int, ...] = ()  # end the answer, as the model's own end does
    echo_scores: bool = False  # whether the prompt's tokens are scored, too

    def check(self, config: ModelConfig, max_length: int) -> None:
        """Raises a `UserError` if the request can never be answered.

        Args:
          config: of the model.
          max_length: the tokens that prompt and answer may have together.
        """
        check_row(self.prompt, config, "prompt")
        at_least(0 if self.echo_scores else 1, max_tokens=self.max_tokens)
        at_least(0, alternatives=self.alternatives)
        at_most(MAX_ALTERNATIVES, alternatives=self.alternatives)
        for name, value in self.sampling._asdict().items():
            scalar(type(getattr(PLAIN, name)), value, name)
        self.sampling.check()
        if len(self.prompt) + self.max_tokens > max_length:
            raise UserError(f"prompt and answer within {max_length} tokens",
                            f"{len(self.prompt)} + {self.max_tokens}", "shorten one of them",
                            where="max_tokens")
        if len(self.bias) > MAX_BIAS:
            raise UserError(f"at most {MAX_BIAS} tokens", len(self.bias), "leave some out",
                            where="bias")
        if len(self.stop_ids) > MAX_STOPS:
            raise UserError(f"at most {MAX_STOPS} tokens", len(self.stop_ids), "leave some out",
                            where="stop_ids")
        for token, value in self.bias:
            check_row([token], config, "bias")
            if not math.isfinite(value):
                raise UserError("a number", value, "-100 bans a token", where="bias")


class Piece(NamedTuple):
    """One token, and what the model thought of it."""

    token: int
    # Its log-probability by the model alone: at temperature 1, before biases, penalties and cuts.
    # NaN for the first token of a prompt, which nothing precedes.
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, the likeliest first


Reason = Literal["stop", "length", "cancelled", "timeout", "fault"]


class Finished(NamedTuple):
    """The end of an answer."""

    # stop: the model ended its answer, and that token is not reported. length: `max_tokens`.
    # fault: the engine failed.
    reason: Reason
    prompt_tokens: int
    reused_tokens: int  # of the prompt, whose keys and values the prefix cache had
    prompt_pieces: tuple[Piece, ...] = ()  # with `echo_scores`: the prompt's tokens


# Gets every token of an answer and then its end, in the engine's thread. It must not block.
Sink = Callable[[Piece | Finished], None]


@dataclass(frozen=True)
class Ticket:
    """Names a request that was submitted."""

    number: int


class Busy(Exception):
    """The engine takes no more requests at the moment."""

    def __init__(self, why: str, retry_after_seconds: int) -> None:
        super().__init__(f"{why}; try again in {retry_after_seconds} s")
        self.retry_after_seconds = retry_after_seconds
