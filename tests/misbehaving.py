"""A small real HTTP server with the parts of OpenAI's API that the client uses. It misbehaves as a test asks."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

MODELS = [
    {"id": "base", "object": "model", "created": 0, "owned_by": "x", "root": "/m", "parent": None},
    {"id": "recursive_reasoner", "object": "model", "created": 0, "owned_by": "x", "root": "/a", "parent": "base"},
]
PLAN = '{"should_decompose":true,"subproblems":["What is 2 + 3?","What is 4 + 1?"],"plan":"Add."}'


class MisbehavingServer:
    """Answers like a planner and a worker, unless `fault(handler, request)` has answered itself and returns True.

    `requests` holds the JSON body of every chat request; `headers` holds the headers of the latest one.
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
                    outer.headers = {name.title(): value for name, value in self.headers.items()}
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
            request_queue_size = 128  # so that many clients at once are not refused

            def handle_error(self, request, client_address):
                """Print no traceback: a client that closes the connection is expected."""

        self._listener: Callable[[int], ThreadingHTTPServer] = lambda port: Listener(("127.0.0.1", port), Handler)
        self._server: ThreadingHTTPServer | None = None
        self._port = 0
        self.listen_again()
        self.url = f"http://127.0.0.1:{self._port}/v1"

    @property
    def asked(self) -> list[dict[str, Any]]:
        """The chat requests, without those of the check at start (do system messages reach the model?)."""
        return [request for request in self.requests if request["max_tokens"] > 1]

    def close(self) -> None:
        """Stop the server: new connections are refused. It answers on those that exist until they are closed."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def listen_again(self) -> None:
        """After `close`, accept connections again at the same address. Without one it does nothing."""
        with self._lock:
            if self._server is None:
                self._server = self._listener(self._port)
                self._port = self._server.server_address[1]
                threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def completion(self, request: dict[str, Any], text: str | None = None) -> dict[str, Any]:
        """A correct reply to a chat request; without `text` a plan, or an answer of the worker."""
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
        prompt = sum(len(message["content"].split()) for message in request["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
        return {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [choice],
            "usage": usage,
        }


def asks(request: dict[str, Any], words: str) -> bool:
    """Whether a chat request is about a question that contains these words."""
    return any(words in message["content"] for message in request.get("messages", []))


def reshaped(server: MisbehavingServer, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change every chat reply by `change(reply, its first choice)` before it is sent."""

    def fault(handler: Any, request: dict[str, Any]) -> bool:
        if request:
            reply = server.completion(request)
            change(reply, reply["choices"][0])
            handler.reply(reply)
        return bool(request)

    server.fault = fault


def echoed(handler: Any) -> str:
    """The key of a request, in every encoding in which a server or library may repeat it."""
    sent = handler.headers.get("Authorization") or ""
    key = sent.removeprefix("Bearer ")
    raw = f"x:{key}".encode()
    forms = [sent, repr(sent.encode()), json.dumps(sent), quote(sent), base64.b64encode(raw).decode(), raw.hex()]
    return " ".join([*forms, f"{key[:12]}***{key[-12:]}", f"/v1?key={key}", repr({"authorization": sent})])


def _dropped(handler: Any, data: bytes = b"") -> bool:
    """Send bytes that are not HTTP, then close the connection."""
    handler.wfile.write(data)
    handler.close_connection = True
    return True


# Faults by name. Where a server could repeat the key, the fault does.
FAULTS: dict[str, Callable[[Any, dict[str, Any]], bool]] = {
    **{
        f"status {status}": lambda handler, request, status=status: handler.error(status, echoed(handler))
        for status in (400, 401, 403, 404, 409, 422, 429, 500, 503)
    },
    "status 500, no reason": lambda handler, request: handler.error(500, ""),
    "an error with status 200": lambda handler, request: not handler.reply({"error": {"message": echoed(handler)}}),
    "an error in the choice": lambda handler, request: not handler.reply(
        {"choices": [{"error": {"code": 502, "message": echoed(handler)}, "message": {"content": ""}}]}
    ),
    "the key as answer": lambda handler, request: not handler.reply(
        {"choices": [{"message": {"content": echoed(handler) + ' {"final_answer": 5}'}}], "data": [{"id": echoed(handler)}]}
    ),
    "a page": lambda handler, request: not handler.reply(f"<html>{echoed(handler)}</html>", kind="text/html"),
    "half a page": lambda handler, request: not handler.reply("{" + echoed(handler)),
    "no choices": lambda handler, request: not handler.reply({"choices": [], "told": echoed(handler)}),
    "a header that is none": lambda handler, request: _dropped(
        handler, f"HTTP/1.1 200 {echoed(handler)}\r\nX: \x01{echoed(handler)}\r\n\r\n".encode()
    ),
    "no HTTP": lambda handler, request: _dropped(handler, echoed(handler).encode() + b"\r\n\r\n"),
    "a redirect": lambda handler, request: not handler.reply("", 307, Location=f"http://127.0.0.1:9/{echoed(handler)}"),
    "hung up": lambda handler, request: _dropped(handler),
}  # fmt: skip


def hang(seconds: float) -> Callable[[Any, dict[str, Any]], bool]:
    """A fault that delays every chat request by this many seconds."""

    def fault(handler: Any, request: dict[str, Any]) -> bool:
        if request:
            time.sleep(seconds)
        return False

    return fault


class LoraServer(MisbehavingServer):
    """Also answers vLLM's requests for adapters and token ids.

    `refusal` is the reply to the next requests to load an adapter; None breaks the connection.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, str] = {}
        self.refusal: tuple[int, dict] | bool | None = False
        self.sampled: list[dict[str, Any]] = []  # requests for completions
        self.too_long: list[list[int]] = []  # prompts that are refused as too long
        self.fault = self._adapters

    def _adapters(self, handler, request) -> bool:
        if not request:
            entries = [{"id": name, "root": path, "parent": "base"} for name, path in self.loaded.items()]
            handler.reply({"object": "list", "data": [{"id": "base", "root": "/m", "parent": None}, *entries]})
        elif handler.path.endswith("/unload_lora_adapter"):
            found = self.loaded.pop(request["lora_name"], None)
            handler.reply("gone", 200 if found else 404, "text/plain")
        elif handler.path.endswith("/completions"):
            known = request["model"] in self.loaded
            with self._lock:
                self.sampled.append(request)
            if not known:
                handler.error(404, f"The model `{request['model']}` does not exist.")
            elif request["prompt"] in self.too_long:
                handler.error(400, "This model's maximum context length is 4 tokens")
            else:
                choice = {"token_ids": [7, 2], "logprobs": {"token_logprobs": [-0.5, None]}, "text": "x"}
                handler.reply({"choices": [choice]})
        elif self.refusal is None:
            handler.close_connection = True
        elif self.refusal:
            handler.reply(self.refusal[1], self.refusal[0])
        elif not (Path(request["lora_path"]) / "weights").is_file():
            handler.error(404, f"Loading lora failed: No adapter found for {request['lora_path']}")
        else:
            self.loaded[request["lora_name"]] = request["lora_path"]
            handler.reply("Success", 200, "text/plain")
        return True
