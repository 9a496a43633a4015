"""`lmjax bench serve --url URL`: many clients of a server of the OpenAI API, over HTTP."""

import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lmjax.benchmarks.rounds import Report, write_report
from lmjax.errors import UserError, first_line

CLIENTS = 64
PROMPT_WORDS = (8, 64)  # the fewest and the most words of a prompt
ANSWER_TOKENS = (16, 64)
WORDS = ("the", "def", "return", "a", "list", "of", "values", "in", "self", "file", "reads", "is",
         "and", "writes", "name", "with", "for", "each", "line", "import", "class", "to", "it")
PATIENCE = 120  # seconds without a byte after which a request has failed
SHOW = 15  # seconds between lines of progress


@dataclass
class _Seen:
    """What the clients have seen so far."""

    waits: list[float] = field(default_factory=list)  # seconds to the first token of a request
    gaps: list[float] = field(default_factory=list)  # seconds per token after the first
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


def bench_clients(url: str, model: str = "", *, clients: int = CLIENTS, seconds: float = 60.0,
                  out: str = "") -> Report:
    """Lets clients ask a server again and again, and prints what they saw.

    Each client streams greedy answers to prompts of random length, one after the other. A request
    that is under way when the time is up is read to its end.

    Args:
      url: of /v1/completions or /v1/chat/completions.
      model: its name; "": the first that the server lists.
      clients: at the same time.
      seconds: how long new requests are made.
      out: a file for the figures as JSON; "" writes none.

    Returns:
      the figures; a token of a server that counts none is a piece of its stream.

    Raises:
      UserError: the URL is another one, or nothing answers there.
    """
    place = urlsplit(url)
    if place.scheme != "http" or not place.path.endswith("/completions"):
        raise UserError("http://HOST:PORT/v1/completions or .../v1/chat/completions", repr(url),
                        "correct it", where="--url")
    model = model or _first_model(place)
    seen, until, began = _Seen(), time.monotonic() + seconds, time.monotonic()
    threads = [threading.Thread(target=_client, args=(place, model, i, until, seen), daemon=True)
               for i in range(clients)]
    for thread in threads:
        thread.start()
    shown = time.monotonic()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.5)
            if time.monotonic() - shown > SHOW:
                shown = time.monotonic()
                print(f"{shown - began:.0f} of {seconds:.0f} s: {len(seen.waits):,} requests, "
                      f"{sum(seen.errors.values())} errors", file=sys.stderr, flush=True)
    took = time.monotonic() - began
    report: Report = {
        "url": url, "model": model, "clients": clients, "seconds": took,
        "requests": len(seen.waits), "errors": dict(seen.errors), "tokens": seen.tokens,
        "tokens_per_second": seen.tokens / took,
        "first_token_seconds": {"p50": _quantile(seen.waits, 50), "p99": _quantile(seen.waits, 99)},
        "seconds_per_token": {"p50": _quantile(seen.gaps, 50), "p99": _quantile(seen.gaps, 99)}}
    _print(report)
    write_report(report, out)
    return report


def _first_model(place: SplitResult) -> str:
    path = place.path.removesuffix("/completions").removesuffix("/chat") + "/models"
    try:
        connection = http.client.HTTPConnection(place.netloc, timeout=PATIENCE)
        connection.request("GET", path)
        found = json.loads(connection.getresponse().read())["data"][0]["id"]
        connection.close()
    except (OSError, ValueError, LookupError, http.client.HTTPException) as error:
        raise UserError(f"a server that lists its models at {path}", first_line(error),
                        "start it first, or give --model", where="--url") from None
    return str(found)


def _client(place: SplitResult, model: str, number: int, until: float, seen: _Seen) -> None:
    """Asks until the time is up."""
    rng = random.Random(number)
    while time.monotonic() < until:
        prompt = " ".join(rng.choices(WORDS, k=rng.randint(*PROMPT_WORDS)))
        asked = ({"messages": [{"role": "user", "content": prompt}]}
                 if "/chat/" in place.path else {"prompt": prompt})
        body = {"model": model, **asked, "max_tokens": rng.randint(*ANSWER_TOKENS),
                "temperature": 0, "stream": True}
        try:
            _ask(place, body, seen)
        except (OSError, ValueError, http.client.HTTPException) as error:
            with seen.lock:
                seen.errors[first_line(error)] += 1
            time.sleep(0.1)


def _ask(place: SplitResult, body: dict[str, Any], seen: _Seen) -> None:
    began, first, pieces, counted = time.monotonic(), 0.0, 0, 0
    connection = http.client.HTTPConnection(place.netloc, timeout=PATIENCE)
    try:
        connection.request("POST", place.path, json.dumps(body),
                           {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(f"status {response.status}")
        for event in _events(response):
            if "error" in event:
                raise OSError(first_line(event["error"]))
            counted = (event.get("usage") or {}).get("completion_tokens") or counted
            choice: dict[str, Any] = next(iter(event.get("choices") or ()), {})
            if choice.get("text") or (choice.get("delta") or {}).get("content"):
                pieces += 1
                first = first or time.monotonic()
    finally:
        connection.close()
    ended, tokens = time.monotonic(), counted or pieces
    with seen.lock:
        seen.waits.append((first or ended) - began)
        seen.tokens += tokens
        if tokens > 1 and first:
            seen.gaps.append((ended - first) / (tokens - 1))


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    for line in response:
        text = line.decode().strip()
        if text.startswith("data:") and text != "data: [DONE]":
            yield json.loads(text.removeprefix("data:"))


def _quantile(values: list[float], percent: int) -> float:
    """A percentile; nan of fewer than two values."""
    if len(values) < 2:
        return float("nan")
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _print(report: Report) -> None:
    waits, gaps = report["first_token_seconds"], report["seconds_per_token"]
    print(f"{report['model']}: {report['clients']} clients, {report['seconds']:.0f} s, "
          f"{report['requests']:,} requests, {sum(report['errors'].values())} errors, "
          f"{report['tokens_per_second']:,.0f} tokens/s\n"
          f"first token after {waits['p50']:.2f} s (median), {waits['p99']:.2f} s (99%); "
          f"then {1e3 * gaps['p50']:.1f} ms per token (median), {1e3 * gaps['p99']:.1f} ms (99%)")
    for error, count in report["errors"].items():
        print(f"{count} times: {error}")
