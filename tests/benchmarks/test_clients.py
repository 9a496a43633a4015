"""The clients of a server against a stand-in that streams what it is told to."""

import http.server
import json
import threading
import time

import pytest

from lmjax.benchmarks import clients
from lmjax.cli.main import main


class StandIn(http.server.BaseHTTPRequestHandler):
    """Waits 20 ms, then sends three pieces; every request with an odd number of words fails."""

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(200, json.dumps({"data": [{"id": "small"}]}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "small" and body["stream"] and body["temperature"] == 0
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        if len(prompt.split()) % 2 and self.server.fails:
            self.reply(500, "{}")
            return
        time.sleep(0.02)
        pieces = [{"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]}] * 3
        if self.server.counts:
            pieces.append({"choices": [], "usage": {"completion_tokens": 7}})
        self.reply(200, "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
                   + "data: [DONE]\n\n")

    def reply(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as made:
        made.fails = made.counts = False
        made.daemon_threads = True
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_tokens_and_waits_are_those_of_the_stream(server, path, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(clients, "CLIENTS", 3)
    server.counts = counts
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/{path}"
    found = clients.bench_clients(url, clients=3, seconds=0.2, out=str(tmp_path / "out.json"))
    assert found["requests"] > 3 and not found["errors"]
    assert found["tokens"] == found["requests"] * (7 if counts else 3)
    assert 0.02 <= found["first_token_seconds"]["p50"] <= found["first_token_seconds"]["p99"]
    assert json.loads((tmp_path / "out.json").read_text())["model"] == "small"


def test_what_fails_is_counted_and_the_rest_goes_on(server, capsys):
    server.fails = True
    url = f"http://127.0.0.1:{server.server_address[1]}/v1/completions"
    found = clients.bench_clients(url, clients=4, seconds=0.5)
    assert found["errors"]["status 500"] > 0 and found["requests"] > 0
    assert "times: status 500" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://x/v1/completions", "http://x/v1"])
def test_another_address_is_refused(url, capsys):
    assert main(["bench", "serve", "--url", url]) == 2
    assert "--url: expected http://HOST:PORT/v1/completions" in capsys.readouterr().err


def test_an_address_where_nobody_answers_is_told_in_one_line(capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9/v1/completions"]) == 2
    error = capsys.readouterr().err
    assert "start it first" in error and error.count("\n") == 1
