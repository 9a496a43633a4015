"""Who is let in: hosts, keys, and how many at a time."""

import asyncio
import json

import pytest

from lmjax.serving.guard import Guard
from lmjax.serving.metrics import Metrics


def ask(path="/v1/models", *, key="", hosts=(), most=9, at_once=1, **headers):
    """The statuses and bodies of requests that come at the same time."""
    release, replies = asyncio.Event(), []

    async def app(scope, receive, send):
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    guard = Guard(app, key=key, hosts=hosts, most=most, metrics=Metrics({}))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    async def one():
        sent = []

        async def send(message):
            sent.append(message)
        await guard({"type": "http", "path": path, "headers": raw, "method": "GET"}, None, send)
        replies.append((sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]))

    async def everybody():
        asked = [asyncio.create_task(one()) for _ in range(at_once)]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*asked)
    asyncio.run(everybody())
    return replies


@pytest.mark.parametrize("header", [None, "", "a-key", "Bearer", "Bearer b-key", "Basic a-key",
                                    "Bearer a-key2", "Bearer \xff\xfe"])
def test_a_wrong_key(header):
    headers = {} if header is None else {"authorization": header}
    [(status, got, body)] = ask(key="a-key", **headers)
    assert status == 401 and got[b"www-authenticate"] == b"Bearer"
    assert json.loads(body)["error"]["code"] == "invalid_api_key" and b"a-key" not in body


def test_the_right_key_and_what_needs_none():
    assert ask(key="a-key", authorization="Bearer a-key")[0][0] == 200
    assert ask(key="a-key", authorization="bearer a-key ")[0][0] == 200
    for path in ("/", "/health", "/openapi.json", "/page/app.js"):
        assert ask(path, key="a-key")[0][0] == 200
    for path in ("/metrics", "/tokenize", "//", "/page", "/health/"):
        assert ask(path, key="a-key")[0][0] == 401


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("localhost:8000", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200),
    ("LOCALHOST", 200), ("", 403), ("evil.example", 403), ("localhost.evil.example:8000", 403),
    ("127.0.0.1.evil.example", 403), ("[::2]:8000", 403)])
def test_names_of_this_machine(host, status):
    [(got, headers, _)] = ask(hosts=("localhost", "127.0.0.1", "::1"), host=host)
    assert got == status and b"content-security-policy" in headers


def test_a_fault_is_counted_and_passed_on():
    async def app(scope, receive, send):
        raise ZeroDivisionError

    metrics = Metrics({})
    guard = Guard(app, key="", hosts=(), most=1, metrics=metrics)
    for _ in range(2):  # the first one has left its place
        with pytest.raises(ZeroDivisionError):
            asyncio.run(guard({"type": "http", "path": "/", "headers": []}, None, None))
    assert b'lmjax_http_requests_total{endpoint="other",status="500"} 2.0' in metrics.text()


def test_no_more_than_so_many_at_a_time():
    replies = ask(most=3, at_once=5)
    assert sorted(status for status, _, _ in replies) == [200, 200, 200, 429, 429]
    assert all(headers[b"retry-after"] == b"1" for status, headers, _ in replies if status == 429)
