"""A real process of `lmjax serve`, and the real client of the OpenAI API."""

import base64
import concurrent.futures
import http.client
import json
import signal
import socket
import time

import numpy as np
import pytest
import servers

import lmjax
from lmjax.decoding.sampling import Sampling

openai = pytest.importorskip("openai", reason="openai is not installed, so the server is not "
                             "tested with its client: pip install 'lmjax[test]'")
pytestmark = pytest.mark.long
PROMPTS = ["the cat", "\u4f60\u597d\uff0c\u4e16\u754c", "\U0001f468\u200d\U0001f469 a",
           "def f(x):\n    "]
CHAT = [{"role": "system", "content": "the"}, {"role": "user", "content": "a dog"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    servers.make(folder / "tiny")
    servers.make(folder / "vectors", "encoder")
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return lmjax.load(folder / "tiny")


@pytest.fixture(scope="module")
def server(folder):
    made = servers.Server(folder, folder / "tiny", folder / "vectors", "--slots", "3",
                          "--queue", "2", "--max-body", "0.1")
    yield made
    made.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def complete(client, prompt, **more):
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 40,
                                        "temperature": 0, **more})


def talk(client, messages=CHAT, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": messages,
                                             "max_tokens": 40, "temperature": 0, **more})


def test_greedy_completions_are_those_of_the_library(client, lm):
    reply = complete(client, PROMPTS)
    expected = lm.generate(PROMPTS, max_tokens=40, temperature=0)
    assert [choice.text for choice in reply.choices] == expected
    ids = [lm.reader.ids(prompt, end=False) for prompt in PROMPTS]
    assert reply.usage.prompt_tokens == sum(map(len, ids))
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert [choice.text for choice in complete(client, ids).choices] == expected


def test_streamed_parts_join_to_the_whole_text(client, lm):
    for prompt in PROMPTS:
        parts = list(complete(client, prompt, stream=True, logprobs=2,
                              stream_options={"include_usage": True}))
        whole = complete(client, prompt, logprobs=2)
        choices = [part.choices[0] for part in parts[:-1]]
        assert parts[-1].usage.total_tokens == whole.usage.total_tokens
        assert "".join(choice.text for choice in choices) == whole.choices[0].text
        assert [choice.finish_reason for choice in choices] == (
            [None] * (len(choices) - 1) + [whole.choices[0].finish_reason])
        for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            joined = [x for choice in choices for x in getattr(choice.logprobs, field)]
            assert joined == getattr(whole.choices[0].logprobs, field)


def test_log_probabilities_are_those_of_the_library(client, lm):
    for prompt in PROMPTS[:2]:
        reply = complete(client, prompt, logprobs=1, max_tokens=12)
        scores, ids = reply.choices[0].logprobs, lm.reader.ids(prompt, end=False)
        made = lm_tokens(lm, ids, len(scores.tokens))
        expected, _ = lm.continuations([([*ids, *made], len(made))])[0]
        assert sum(scores.token_logprobs) == pytest.approx(expected, abs=1e-3)
        # A greedy token is the likeliest.
        assert [max(top.values()) for top in scores.top_logprobs] == scores.token_logprobs


def test_a_prompt_is_scored_as_by_the_library(client, lm):
    for prompt in PROMPTS[:2]:
        ids = lm.reader.ids(prompt, end=False)
        expected, _ = lm.continuations([(ids, len(ids) - 1)])[0]
        for more in ({"max_tokens": 0}, {"max_tokens": 3}, {"max_tokens": 3, "stream": True}):
            reply = complete(client, prompt, echo=True, logprobs=1, **more)
            choice = (next(iter(reply)) if "stream" in more else reply).choices[0]
            scores = choice.logprobs
            assert len(scores.tokens) == len(ids) + more["max_tokens"]
            assert scores.token_logprobs[0] is None is scores.top_logprobs[0]
            assert sum(scores.token_logprobs[1 : len(ids)]) == pytest.approx(expected, abs=1e-3)
            assert choice.text.startswith(prompt) and choice.finish_reason == "length"
            assert scores.text_offset[-1] <= len(choice.text)


def lm_tokens(lm, ids, count):
    """The ids of the likeliest answer."""
    [answer] = lm._generator(lm.params, [ids], max_tokens=count,
                             sampling=Sampling(0.0))
    return answer


def test_a_conversation(client, lm):
    reply = talk(client)
    assert reply.choices[0].message.content.strip() == lm.chat(CHAT, max_tokens=40, temperature=0)
    parts = list(talk(client, stream=True, stream_options={"include_usage": True}))
    again, once = parts[-1].usage, reply.usage
    assert parts[0].choices[0].delta.role == "assistant"
    assert again.total_tokens == once.total_tokens == once.prompt_tokens + once.completion_tokens
    assert again.prompt_tokens_details.cached_tokens > 0  # the same prompt once more
    assert "".join(choice.delta.content or "" for part in parts for choice in part.choices
                   ) == reply.choices[0].message.content
    listed = [{**said, "content": [{"type": "text", "text": said["content"]}]} for said in CHAT]
    assert talk(client, listed).choices[0].message.content == reply.choices[0].message.content


def test_log_probabilities_of_a_conversation(client):
    reply = talk(client, logprobs=True, top_logprobs=3, max_completion_tokens=9)
    content = reply.choices[0].logprobs.content
    assert reply.usage.completion_tokens == len(content) == 9
    raw = b"".join(bytes(token.bytes) for token in content)
    assert raw.decode(errors="replace") == reply.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob


def test_choices_seeds_and_stops(client):
    many = complete(client, "the cat", n=3, seed=7, temperature=1, max_tokens=20)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    for i, choice in enumerate(many.choices):  # choice i of seed s is choice 0 of seed s + i
        one = complete(client, "the cat", seed=7 + i, temperature=1, max_tokens=20)
        assert one.choices[0].text == choice.text
    assert len({choice.text for choice in many.choices}) == 3
    text = many.choices[0].text
    stop = text[5:7]
    cut = complete(client, "the cat", seed=7, temperature=1, max_tokens=20, stop=[stop, "zzz"])
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    forced = complete(client, "a", max_tokens=2, logit_bias={"300": 100}, logprobs=1)
    assert len(set(forced.choices[0].logprobs.tokens)) == 1
    echo = complete(client, "the cat", echo=True, max_tokens=3).choices[0].text
    assert echo == "the cat" + complete(client, "the cat", max_tokens=3).choices[0].text


def test_embeddings(client, lm, folder):
    for name, model in (("tiny", lm), ("vectors", lmjax.load(folder / "vectors"))):
        expected = model.embed(PROMPTS)
        for form in ("float", "base64"):
            reply = client.embeddings.create(model=name, input=PROMPTS, encoding_format=form)
            found = [np.frombuffer(base64.b64decode(e.embedding), "<f4") if form == "base64"
                     else e.embedding for e in reply.data]
            np.testing.assert_allclose(found, expected, atol=1e-5)
        assert reply.usage.prompt_tokens == sum(len(model.reader.ids(p)) for p in PROMPTS)


def test_models_and_tokens(client, server, lm):
    assert [model.id for model in client.models.list()] == ["tiny", "vectors"]
    assert client.models.retrieve("tiny").id == "tiny"
    for prompt in PROMPTS:
        reply = json.loads(server.ask("/tokenize", {"model": "tiny", "prompt": prompt})[2])
        assert reply["tokens"] == lm.reader.ids(prompt, end=False)
        reply = json.loads(server.ask("/detokenize", {"model": "tiny",
                                                      "tokens": reply["tokens"]})[2])
        assert reply == {"prompt": prompt}


def test_the_program_of_the_documentation_runs(server, capsys):
    page = (servers.ROOT / "docs/serving.md").read_text()
    program = page.split("```py\n")[1].split("```")[0]
    assert "http://127.0.0.1:8000" in program and '"quickstart"' in program
    exec(program.replace("http://127.0.0.1:8000", server.url).replace("quickstart", "tiny"), {})
    assert capsys.readouterr().out.strip()


def test_errors_are_those_of_the_client(client):
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        complete(client, "a", model="other")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"
    with pytest.raises(openai.BadRequestError, match="context has 256 tokens") as caught:
        complete(client, "the " * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="less than or equal to 2") as caught:
        complete(client, "a", temperature=3)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="makes vectors") as caught:
        complete(client, "a", model="vectors")
    with pytest.raises(openai.BadRequestError, match="Unrecognized request argument: tools"):
        talk(client, tools=[{"type": "function", "function": {"name": "f"}}])


def test_a_flood_is_told_to_come_back(client, server):
    def one(number):
        try:
            return complete(client, "a dog", max_tokens=100, temperature=1, seed=number)
        except openai.RateLimitError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        found = list(pool.map(one, range(24)))
    refused = [reply for reply in found if isinstance(reply, openai.RateLimitError)]
    assert len(refused) < 24 and refused
    assert all(int(error.response.headers["Retry-After"]) >= 1 and error.code == "queue_full"
               for error in refused)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(server, stream):
    host, port = server.url.removeprefix("http://").split(":")
    before = server.figures()
    gone = [http.client.HTTPConnection(host, int(port)) for _ in range(3)]  # all slots
    for seed, connection in enumerate(gone):
        connection.request("POST", "/v1/completions", json.dumps(
            {"model": "tiny", "prompt": "a", "max_tokens": 240, "stream": stream, "seed": seed,
             "logit_bias": {"2": -100}}), {"Content-Type": "application/json"})
    for connection in gone:
        connection.close()
    deadline = time.monotonic() + 10
    while (now := server.figures())['lmjax_engine_running{model="tiny"}'] or (
            now['lmjax_engine_requests_total{model="tiny"}']
            < before['lmjax_engine_requests_total{model="tiny"}'] + 3):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    made = 'lmjax_engine_tokens_total{model="tiny"}'
    assert now[made] - before[made] < 3 * 200  # not to their ends


# What a client may send, and the status and the code that it gets.
BAD = {
    "no JSON": (b"{", 400, "invalid_json"),
    "nothing": (b"", 400, "invalid_json"),
    "no UTF-8": (b'{"model": "tiny", "prompt": "\xff\xfe"}', 400, "invalid_json"),
    "half a surrogate pair": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "invalid_json"),
    "deep": (b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}", 400,
             "invalid_json"),
    "NaN": (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "invalid_value"),
    "infinity": (b'{"model": "tiny", "prompt": "a", "top_p": 1e999}', 400, "invalid_value"),
    "a huge number": (b'{"model": "tiny", "prompt": "a", "seed": 1' + b"0" * 5000 + b"}", 400,
                      None),
    "a list": (b"[]", 400, "invalid_value"),
    "a huge body": (b'{"model": "tiny", "prompt": "' + b"a" * 200_000 + b'"}', 413,
                    "body_too_large"),
    "no prompt": ({}, 400, "missing_required_parameter"),
    "another type": ({"prompt": 3}, 400, "invalid_value"),
    "mixed": ({"prompt": ["a", 3]}, 400, "invalid_value"),
    "no text at all": ({"prompt": []}, 400, "invalid_value"),
    "a number as a text": ({"prompt": "a", "max_tokens": "3"}, 400, "invalid_value"),
    "half a token": ({"prompt": "a", "max_tokens": 3.5}, 400, "invalid_value"),
    "true as a number": ({"prompt": "a", "max_tokens": True}, 400, "invalid_value"),
    "fewer than no tokens": ({"prompt": "a", "max_tokens": -1}, 400, "invalid_value"),
    "no such field": ({"prompt": "a", "max_token": 3}, 400, "unknown_parameter"),
    "no such model": ({"prompt": "a", "model": "../tiny"}, 404, "model_not_found"),
    "no such id": ({"prompt": [320]}, 400, "invalid_value"),
    "a negative id": ({"prompt": [-1]}, 400, "invalid_value"),
    "no such id to bias": ({"prompt": "a", "logit_bias": {"320": 1}}, 400, "invalid_value"),
    "a biased word": ({"prompt": "a", "logit_bias": {"dog": 1}}, 400, "invalid_value"),
    "an empty stop": ({"prompt": "a", "stop": ""}, 400, "invalid_value"),
    "five stops": ({"prompt": "a", "stop": list("abcde")}, 400, "invalid_value"),
    "too many choices": ({"prompt": "a", "n": 17}, 400, "invalid_value"),
    "too many prompts": ({"prompt": ["a"] * 65}, 400, "invalid_value"),
    "best of several": ({"prompt": "a", "best_of": 2}, 400, "invalid_value"),
    "a penalty": ({"prompt": "a", "presence_penalty": 1}, 400, "invalid_value"),
    "options without a stream": ({"prompt": "a", "stream_options": {}}, 400, "invalid_value"),
    "too long": ({"prompt": "x" * 300}, 400, "context_length_exceeded"),
    "exactly too long": ({"prompt": [5] * 256}, 400, "context_length_exceeded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_the_form_of_the_api(server, name):
    body, status, code = BAD[name]
    if isinstance(body, bytes):
        found = server.ask("/v1/completions", raw=body)
    else:
        found = server.ask("/v1/completions", {"model": "tiny", **body})
    assert found[0] == status, found
    error = json.loads(found[2])["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert code is None or error["code"] == code
    assert "Traceback" not in server.text()


def test_what_is_no_request_of_the_api(server):
    good = {"model": "tiny", "prompt": "a"}
    for status, found in (
            (415, server.ask("/v1/completions", good, headers={"Content-Type": "text/plain"})),
            (415, server.ask("/v1/completions", good, headers={"Content-Encoding": "gzip"})),
            (403, server.ask("/v1/models", headers={"Host": "a.stranger.example"})),
            (404, server.ask("/v1/nothing")), (404, server.ask("/page/../app.py")),
            (404, server.ask("/page/%2e%2e/app.py")), (404, server.ask("/v1/models/other")),
            (405, server.ask("/v1/completions")), (405, server.ask("/v1/models", good))):
        assert found[0] == status and json.loads(found[2])["error"]["message"]
    assert server.ask("/v1/completions")[1]["Allow"] == "POST"
    headers = server.ask("/")[1]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]


def test_what_is_no_http_is_not_logged(server):
    host, port = server.url.removeprefix("http://").split(":")
    before = server.text()
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"\x16\x03\x01 not http\xff\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")
    assert server.text() == before


def test_a_killed_server_starts_again_at_the_same_port(server, folder, client, lm):
    stream = complete(client, "the cat", stream=True, max_tokens=240)
    next(iter(stream))
    port = server.url.rpartition(":")[2]
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    server.start("--port", port)
    assert complete(client, "the cat").choices[0].text == lm.generate(
        ["the cat"], max_tokens=40, temperature=0)[0]


def test_a_signal_lets_answers_end(server, folder, client):
    """Last, as it ends the server."""
    stream = complete(client, "the cat", stream=True, max_tokens=240, logit_bias={"2": -100})
    first = next(iter(stream)).choices[0]
    server.process.send_signal(signal.SIGTERM)
    rest = [part.choices[0] for part in stream]
    assert rest[-1].finish_reason == "length" and first.finish_reason is None
    assert server.process.wait(20) == 0
    assert server.text().endswith("stopped\n") and "Traceback" not in server.text()
