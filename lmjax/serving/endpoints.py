"""The endpoints of the OpenAI API, and those beside it that other servers have, too."""

import asyncio
import base64
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lmjax.data.chat import Ends
from lmjax.serving import replies
from lmjax.serving import schema as bodies
from lmjax.serving.answering import Answer, Answers, Mailbox, Wanted
from lmjax.serving.errors import ApiError, of_exception, of_validation
from lmjax.serving.forms import ChatForm, CompletionForm, Form
from lmjax.serving.metrics import Metrics
from lmjax.serving.requests import Request as Question
from lmjax.serving.served_model import Served

BODY_SECONDS = 30  # until a body has arrived
DEFAULT_TOKENS = 16  # max_tokens of /v1/completions, as in the OpenAI API
SEEDS = 2**31  # the engine's seeds are below this
NO_ENDS = Ends()
B = TypeVar("B", bound=bodies.Body)


class Limits(NamedTuple):
    """What one request may take."""

    seconds: float  # until an answer is given up, the time in the queue included
    body_bytes: int  # of a request's body


class EventStream(StreamingResponse):
    """Server-sent events of answers, which end with the response, whatever ends that."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream",
                         headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        async with self._answers:
            await super().__call__(scope, receive, send)


class Endpoints:
    """Answers requests to models by name."""

    def __init__(self, models: Sequence[Served], limits: Limits, metrics: Metrics):
        self.models, self.limits, self.metrics = {m.name: m for m in models}, limits, metrics
        self._mailbox: Mailbox | None = None

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions: continues prompts."""
        asked = await self.read(request, bodies.CompletionRequest)
        served = self.find(asked.model)
        given = asked.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        prompts: list[Any] = [given] if single else list(given)
        wanted_tokens = DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
        served.generating()
        rows = [await served.prompt(prompt) for prompt in prompts]
        form = CompletionForm(served, asked, prompts, rows)
        scores = form.scored and bool(asked.echo)
        wanted = self._wanted(
            served, asked, rows, [served.room(row, wanted_tokens, "prompt",
                                              least=min(wanted_tokens, 1)) for row in rows],
            alternatives=asked.logprobs, echo_scores=scores or not wanted_tokens)
        return await self._answer(request, served, asked, wanted, form)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions: says what the assistant says next."""
        asked = await self.read(request, bodies.ChatRequest)
        served = self.find(asked.model)
        served.generating()
        ids = await served.conversation(asked.messages)
        limit = asked.max_completion_tokens or asked.max_tokens
        wanted = self._wanted(served, asked, [ids], [served.room(ids, limit, "messages")],
                              alternatives=(asked.top_logprobs or 0) if asked.logprobs else None,
                              ends=served.ends)
        return await self._answer(request, served, asked, wanted, ChatForm(served, asked))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: one vector per text."""
        asked = await self.read(request, bodies.EmbeddingRequest)
        served = self.find(asked.model)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        vectors, tokens = await served.embed(texts)
        rows = vectors.astype("<f4")
        coded = [base64.b64encode(row.tobytes()).decode()
                 if asked.encoding_format == "base64" else row.tolist() for row in rows]
        data: list[replies.Vector] = [{"object": "embedding", "index": i, "embedding": vector}
                                      for i, vector in enumerate(coded)]
        reply: replies.Embeddings = {
            "object": "list", "model": served.name, "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
        return JSONResponse(reply)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: what is served."""
        reply: replies.Models = {"object": "list",
                                 "data": [replies.model_info(m) for m in self.models.values()]}
        return JSONResponse(reply)

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/{model}: one of them."""
        return JSONResponse(replies.model_info(self.find(request.path_params["model"])))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the token ids of a text."""
        asked = await self.read(request, bodies.TokenizeRequest)
        served = self.find(asked.model)
        ids = await served.prompt(asked.prompt) if asked.add_special_tokens else (
            await asyncio.to_thread(served.names.encode, asked.prompt))
        reply: replies.Tokens = {"count": len(ids), "max_model_len": served.max_length,
                                 "tokens": ids}
        return JSONResponse(reply)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: the text of token ids."""
        asked = await self.read(request, bodies.DetokenizeRequest)
        served = self.find(asked.model)
        wrong = [i for i in asked.tokens if i >= served.names.vocab_size]
        if wrong:
            raise ApiError(400, f"tokens: the tokenizer has no id {wrong[0]}, only 0 to "
                           f"{served.names.vocab_size - 1}.", param="tokens", code="invalid_value")
        reply: replies.Text = {"prompt": await asyncio.to_thread(served.names.decode,
                                                                 asked.tokens)}
        return JSONResponse(reply)

    def find(self, name: str) -> Served:
        """The model of that name.

        Raises:
          ApiError: there is none.
        """
        if name not in self.models:
            raise ApiError(404, f"The model {name!r:.80} does not exist: this server has "
                           f"{', '.join(self.models)}.", param="model", code="model_not_found")
        return self.models[name]

    async def read(self, request: Request, model: type[B]) -> B:
        """The body of a request.

        Raises:
          ApiError: it is no JSON, too large, too slow, or not what `model` says.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # any page in a browser may send other types to any server
            raise ApiError(415, "Send the body as JSON, with the header Content-Type: "
                           "application/json.", code="unsupported_media_type")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "Send the body without compression.",
                           code="unsupported_media_type")
        parts, size, limit = [], 0, self.limits.body_bytes
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise ApiError(413, f"The body has more than {limit:,} bytes.",
                                       code="body_too_large", headers={"Connection": "close"})
                    parts.append(part)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_SECONDS} s.",
                           headers={"Connection": "close"}) from None
        try:
            return model.model_validate_json(b"".join(parts))
        except ValidationError as error:
            raise of_validation(error) from None

    def _wanted(self, served: Served, asked: bodies.Asked, rows: Sequence[Sequence[int]],
                rooms: Sequence[int], *, alternatives: int | None, echo_scores: bool = False,
                ends: Ends = NO_ENDS) -> list[Wanted]:
        """What is wanted of each answer: `n` to each row of ids."""
        stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        seed = secrets.randbelow(SEEDS) if asked.seed is None else asked.seed
        sampling, bias = served.sampling(asked), served.bias(asked)
        return [Wanted(Question(tuple(row), room, sampling, seed=(seed + choice) % SEEDS,
                                alternatives=alternatives or 0, bias=bias,
                                stop_ids=ends.ids, echo_scores=echo_scores),
                       stop=(*stop, *ends.strings), streamed=bool(asked.stream),
                       scored=alternatives is not None)
                for row, room in zip(rows, rooms, strict=True) for choice in range(asked.n or 1)]

    async def _answer(self, request: Request, served: Served, asked: bodies.Asked,
                      wanted: Sequence[Wanted], form: Form) -> Response:
        """Generates the answers, and sends them whole or as they grow."""
        engine, began, n = served.generating(), time.monotonic(), asked.n or 1
        self._mailbox = self._mailbox or Mailbox(asyncio.get_running_loop())
        answers = Answers(engine.submit, engine.cancel, self._mailbox, self.limits.seconds)
        made = [Answer(i, served.names, one, answers.changed) for i, one in enumerate(wanted)]
        head = {"id": f"{form.prefix}-{secrets.token_hex(12)}", "created": int(time.time()),
                "model": served.name}
        if asked.stream:
            with_usage = asked.stream_options is not None and asked.stream_options.include_usage
            async with contextlib.AsyncExitStack() as undo:
                await undo.enter_async_context(answers)
                answers.submit(made)  # a refusal is a status, not an event
                undo.pop_all()  # from here on the response ends the answers
            return EventStream(answers, self._events(
                answers, form, head | {"object": form.chunk_object}, with_usage, n, began))
        async with answers, _until_gone(request, answers):
            answers.submit(made)
            deltas = await answers.whole()
        self.metrics.first_tokens(served.name, [a.first_at - began for a in made if a.first_at])
        return JSONResponse({**head, "object": form.object,
                             "choices": [form.whole(made[d.number], d) for d in deltas],
                             "usage": replies.usage(made, n)})

    async def _events(self, answers: Answers, form: Form, head: dict[str, Any], with_usage: bool,
                      n: int, began: float) -> AsyncIterator[str]:
        """The events of a stream."""
        try:
            for choice in form.opening(len(answers.all)):
                yield _event(replies.chunk(head, [choice], None, with_usage))
            timed = set()
            async for delta in answers.parts(whole=form.waits):
                answer = answers.all[delta.number]
                if answer.first_at and delta.number not in timed:
                    timed.add(delta.number)
                    self.metrics.first_tokens(head["model"], [answer.first_at - began])
                yield _event(replies.chunk(head, [form.part(answer, delta)], None, with_usage))
            if with_usage:
                yield _event(replies.chunk(head, [], replies.usage(answers.all, n), True))
            yield "data: [DONE]\n\n"
        except ApiError as error:  # the status was sent long ago
            yield _event(of_exception(error).body())


def _event(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


@contextlib.asynccontextmanager
async def _until_gone(request: Request, answers: Answers) -> AsyncIterator[None]:
    """Stops the answers as soon as the client has closed its connection."""
    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        answers.stop("gone")

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
