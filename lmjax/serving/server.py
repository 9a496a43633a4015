"""The server as a process: its socket, its signals, its end."""

import signal
import socket
import threading
from collections.abc import Collection, Sequence
from types import FrameType

import uvicorn

from lmjax.errors import UserError
from lmjax.serving.app import make_app
from lmjax.serving.endpoints import Limits
from lmjax.serving.served_model import Served

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLOSING_SECONDS = 5  # for responses to leave after the engines have stopped
# Until an idle connection is closed. A client that is about to use it again at that moment gets no
# answer, so it is longer than the usual pause between two requests.
IDLE_SECONDS = 75


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet: there is nothing to answer with.

    Raises:
      UserError: the address is taken, or is none of this machine's.
    """
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        if made is not None:
            made.close()
        raise UserError("an address where nobody listens yet", f"{host}, port {port}: "
                        f"{error.strerror}", "choose another --port (0 finds a free one), or a "
                        "--host of this machine", where="--port") from None
    return made


def address_of(made: socket.socket) -> str:
    """The URL of a socket, for people on this machine."""
    host, port = made.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Serving:
    """Serves models until a signal comes."""

    def __init__(self, models: Sequence[Served], limits: Limits, *, listener: socket.socket,
                 key: str, hosts: Collection[str], most: int, drain_seconds: float):
        """
        Args:
          models: what is served; their engines run.
          limits: of one request.
          listener: of `bind`.
          key, hosts, most: see `Guard`.
          drain_seconds: that answers have to end in after SIGTERM.
        """
        self._engines = [model.engine for model in models if model.engine]
        self._drain_seconds, self._listener = drain_seconds, listener
        self._signals: list[int] = []
        app = make_app(models, limits, key=key, hosts=hosts, most=most,
                       draining=lambda: bool(self._signals))
        self._server = uvicorn.Server(uvicorn.Config(
            app, log_config=None, log_level="error", access_log=False, server_header=False,
            ws="none", lifespan="off", timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=int(drain_seconds) + CLOSING_SECONDS))

    def run(self) -> int:
        """Serves, and returns the number of the signal that ended it."""
        before = {number: signal.signal(number, self._stop)
                  for number in (signal.SIGTERM, signal.SIGINT)}
        # Uvicorn leaves signals alone outside the main thread. In it, it would end the process by
        # the same signal once more, after all went well.
        thread = threading.Thread(target=self._server.run, args=([self._listener],), name="http")
        thread.start()
        try:
            thread.join()
        finally:
            for engine in self._engines:
                engine.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._signals[0] if self._signals else 0

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Takes no more requests, and ends when those that were accepted have ended."""
        if self._signals:  # asked twice: at once
            self._server.force_exit = True
        else:
            for engine in self._engines:
                threading.Thread(target=engine.drain, args=(self._drain_seconds,),
                                 daemon=True).start()
        self._signals.append(number)
        self._server.should_exit = True
