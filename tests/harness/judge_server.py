"""A chat server on this machine that answers as a test says."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def completion(text: Any) -> bytes:
    """What an OpenAI-compatible server answers."""
    message = {"role": "assistant", "content": text}
    return json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 7}}).encode()


class Server:
    """Records every request.

    Attributes:
      url: of the API.
      requests: (monotonic time, path, headers, body) of each, in order.
    """

    def __init__(self, answer: Callable[[int, dict], tuple[int, dict, bytes]]):
        """Args:
        answer: of the number of the request and its body: status, headers, body.
        """
        self.requests: list[tuple[float, str, dict, dict]] = []
        lock, mine = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(mine.requests)
                    mine.requests.append((time.monotonic(), self.path, dict(self.headers), body))
                status, headers, data = answer(number, body)
                if status == 0:  # the connection is lost
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def asked(self) -> list[str]:
        """The last turn of every request."""
        return [body["messages"][-1]["content"] for *_, body in self.requests]


@contextlib.contextmanager
def serving(answer: Callable[[int, dict], tuple[int, dict, bytes]]) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()
