"""The part of the Hub's HTTP interface that huggingface_hub uses to push a model, on 127.0.0.1, with faults on request.

With HF_HUB_DISABLE_XET=1, large files use the Git LFS batch interface
(https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md). Otherwise they use Xet, whose store is a local folder
here. Small files are part of the commit, as base64.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from misbehaving import echoed

WRITE, READ, FINE = "hf_write_secret", "hf_read_secret", "hf_fine_secret"
ROLES = {WRITE: "write", READ: "read", FINE: "fineGrained"}
LFS_THRESHOLD = 1_000_000


@dataclass
class Fault:
    """What happens to the next requests whose method and path match.

    Attributes:
        method: HTTP method; "" matches every one.
        part: text that the path contains.
        action: an HTTP status to answer with; "echo STATUS" (the same, and the answer repeats the token in several
            encodings); "cut" (the connection breaks after half of the body); "lost" (the request is carried out, but
            no answer is sent).
        times: number of requests.
    """

    method: str
    part: str
    action: int | str
    times: int = 1


@dataclass
class Repo:
    """A model repo on the server."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    in_xet: dict[str, str] = field(default_factory=dict)  # path → SHA-256 of a file in the Xet store
    commits: int = 0


class HubServer(ThreadingHTTPServer):
    """The server. Use it as a context manager; its `url` is the value for HF_ENDPOINT."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.xet_store: Path | None = None
        self.forbidden: set[str] = set()  # repos to which the token may not write
        self.faults: list[Fault] = []
        self.card_errors: list[str] = []  # errors reported for every model card
        self.log: list[tuple[str, str]] = []
        self.authorised: set[str] = set()  # Authorization headers received
        self.uploaded = 0  # bytes of large files received, interrupted attempts included
        self.lock = threading.Lock()

    def handle_error(self, request, client_address) -> None:
        """Print no traceback: broken connections are part of these tests."""

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection of the server."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_) -> None:
        """Print no line per request."""
        pass

    def do_GET(self) -> None:
        """Handle a GET request, and through aliases every other method."""
        self.handle_request()

    do_POST = do_PUT = do_HEAD = do_GET

    # ------------------------------------------------------------------------------------------- plumbing

    def handle_request(self) -> None:
        """Answer one request, with the fault that applies to it."""
        path = self.path.split("?")[0]
        self.server.log.append((self.command, path))
        if "Authorization" in self.headers:
            self.server.authorised.add(self.headers["Authorization"])
        fault = self.take_fault(path)
        if fault is not None and fault.action == "cut":
            half = int(self.headers.get("Content-Length") or 200_000) // 2
            self.server.uploaded += len(self.rfile.read(half))
            self.hang_up()
            return
        body = self.read_body()
        if fault is not None and isinstance(fault.action, int):
            self.answer(fault.action, {"error": "as ordered"})
            return
        if fault is not None and fault.action.startswith("echo"):
            self.answer(int(fault.action.split()[1]), {"error": echoed(self)}, told=echoed(self))
            return
        status, value = self.route(path, body)
        if fault is not None:  # "lost": carried out, but not answered
            self.hang_up()
            return
        self.answer(status, value)

    def take_fault(self, path: str) -> Fault | None:
        """The fault that applies to this request, counted as used; None without one."""
        with self.server.lock:
            for fault in self.server.faults:
                if fault.times and fault.method in ("", self.command) and fault.part in path:
                    fault.times -= 1
                    return fault
        return None

    def hang_up(self) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        """Read the body of the request, also a chunked one."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: object, told: str | None = None) -> None:
        """Send JSON; `told` goes into the header for error messages."""
        body = json.dumps(value).encode()
        self.send_response(status)
        if told is not None:
            self.send_header("X-Error-Message", told)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    # --------------------------------------------------------------------------------------------- the Hub

    def route(self, path: str, body: bytes) -> tuple[int, object]:
        """Status and JSON of the reply to a request."""
        hub = self.server
        if path.startswith("/lfs/object/"):  # a signed address, which needs no token
            oid = path.rsplit("/", 1)[1]
            hub.uploaded += len(body)
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {"error": "content is not what was announced"}
            hub.objects[oid] = body
            return 200, {}
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        role = ROLES.get(token)
        if path == "/api/validate-yaml":
            errors = [{"message": text} for text in hub.card_errors]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if role is None:
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            access = {"role": role, "displayName": "test"}
            if role == "fineGrained":
                scope = {"entity": {"type": "org", "name": "team"}, "permissions": ["repo.content.read", "repo.write"]}
                access["fineGrained"] = {"global": [], "scoped": [scope]}
            orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
            return 200, {"type": "user", "name": "user", "orgs": orgs, "auth": {"accessToken": access}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'user'}/{asked['name']}"
            if name in hub.repos:
                return 409, {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            hub.repos[name] = Repo(private=asked.get("visibility") == "private")
            return 200, {"url": f"{hub.url}/{name}", "id": name}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self.lfs_action(entry) for entry in json.loads(body)["objects"]],
            }
        if path == "/lfs/verify":
            asked = json.loads(body)
            return (200, {}) if len(hub.objects.get(asked["oid"], b"")) == asked["size"] else (404, {})
        _, _, _, owner, name, *rest = path.split("/")
        return self.model(f"{owner}/{name}", rest, body, role)

    def lfs_action(self, entry: dict) -> dict:
        """Where to upload one file, as the Git LFS batch interface answers."""
        if entry["oid"] in self.server.objects:
            return entry  # the Hub has this file: nothing to upload
        upload = {"href": f"{self.server.url}/lfs/object/{entry['oid']}", "header": {}}
        return {
            **entry,
            "actions": {"upload": upload, "verify": {"href": f"{self.server.url}/lfs/verify", "header": {}}},
        }

    def model(self, name: str, rest: list[str], body: bytes, role: str) -> tuple[int, object]:
        """Status and JSON of the reply to a request about one repo."""
        repo = self.server.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}
        if not rest or rest[0] == "revision":
            return 200, {"id": name, "private": repo.private, "sha": f"{repo.commits:040x}", "siblings": []}
        if role == "read" or name in self.server.forbidden:
            return 403, {"error": "You don't have the rights to write here"}
        if rest[0] == "auth-check":
            return 200, {}
        if rest[0] == "preupload":
            return 200, {"files": [self.upload_mode(repo, entry) for entry in json.loads(body)["files"]]}
        if rest[0] == "xet-write-token":
            store = f"local://{self.server.xet_store}"
            return 200, {"accessToken": "short-lived", "exp": int(time.time()) + 3600, "casUrl": store}
        assert rest[0] == "commit", rest
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and self.server.xet_store is not None:
                repo.in_xet[value["path"]] = value["oid"]
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.server.objects[value["oid"]]
        repo.commits += 1
        return 200, {
            "commitUrl": f"{self.server.url}/{name}/commit/x",
            "commitOid": f"{repo.commits:040x}",
            "success": True,
        }

    def upload_mode(self, repo: Repo, entry: dict) -> dict:
        """Whether a file is sent through LFS or in the commit, and whether the Hub has it."""
        large = entry["size"] > LFS_THRESHOLD or entry["path"].endswith(".safetensors")
        there = repo.files.get(entry["path"])
        oid = None
        if there is not None:
            blob = hashlib.sha1(b"blob %d\0" % len(there) + there).hexdigest()
            oid = hashlib.sha256(there).hexdigest() if large else blob
        return {"path": entry["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
