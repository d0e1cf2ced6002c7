"""A small real HTTP server that speaks enough of OpenAI's API to be asked, and misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = [
    {"id": "base", "object": "model", "created": 0, "owned_by": "x", "root": "/m", "parent": None},
    {"id": "recursive_reasoner", "object": "model", "created": 0, "owned_by": "x", "root": "/a", "parent": "base"},
]
PLAN = '{"should_decompose":true,"subproblems":["What is 2 + 3?","What is 4 + 1?"],"plan":"Add."}'


class MisbehavingServer:
    """Answers like a planner and a worker, until `fault(handler, request)` has answered in its own way (returned True).

    `requests` holds the JSON body of every chat request, `headers` the headers of the latest one.
    """

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] = MODELS
        self.fault: Callable[[Any, dict[str, Any]], bool] = lambda handler, request: False
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.same_as_base = False
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if not outer.fault(self, {}):
                    self.reply({"object": "list", "data": outer.models})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    outer.requests.append(request)
                    outer.headers = dict(self.headers)
                if not outer.fault(self, request):
                    self.reply(outer.completion(request))

            def reply(self, body: Any, status: int = 200, kind: str = "application/json", cut: int = 0, **headers):
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data[: len(data) - cut])
                if cut:
                    self.close_connection = True

            def error(self, status: int, message: str, **headers) -> bool:
                self.reply({"error": {"message": message, "type": "x", "code": status}}, status, **headers)
                return True

            def log_message(self, *args):
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128  # many clients at once are no fault

            def handle_error(self, request, client_address):
                """A client that hung up is no fault of the server's."""

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def completion(self, request: dict[str, Any], text: str | None = None) -> dict[str, Any]:
        planner = request["model"] == "recursive_reasoner"
        text = text if text is not None else PLAN if planner else '{"final_answer": 5}'
        choice: dict[str, Any] = {
            "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
        }  # fmt: skip
        if request.get("logprobs"):
            token = "{" if planner and not self.same_as_base else "The"
            place = {
                "token": token,
                "logprob": -0.1,
                "bytes": None,
                "top_logprobs": [{"token": token, "logprob": -0.1, "bytes": None}],
            }
            choice["logprobs"] = {"content": [place]}
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [choice],
            "usage": usage,
        }


def asks(request: dict[str, Any], words: str) -> bool:
    """Whether a chat request is about a question with these words."""
    return any(words in message["content"] for message in request.get("messages", []))


def hang(seconds: float) -> Callable[[Any, dict[str, Any]], bool]:
    """A fault: every chat request is kept waiting."""

    def fault(handler: Any, request: dict[str, Any]) -> bool:
        if request:
            time.sleep(seconds)
        return False

    return fault
