"""The part of W&B's HTTP interface that starts a run, on 127.0.0.1; it takes everything else and never answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """The server. Use it as a context manager; its `url` is the value for WANDB_BASE_URL.

    Args:
        starts: whether it answers the request that starts a run.
    """

    daemon_threads = True

    def __init__(self, starts: bool) -> None:
        over = self._over = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if starts and b"mutation UpsertBucket" in sent:
                    given = json.loads(sent)["variables"]
                    project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "someone"}}
                    bucket = {"id": "b", "name": given["name"], "displayName": "a run", "config": "{}",
                              "historyLineCount": 0, "project": project}  # fmt: skip
                    reply = json.dumps({"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}).encode()
                    self.send_response(200)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(reply)))
                    self.end_headers()
                    self.wfile.write(reply)
                else:
                    over.wait()
                    self.close_connection = True

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.shutdown()
        self.server_close()
