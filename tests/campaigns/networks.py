"""Faults of what a run talks to: the worker's server, the Hub and W&B. For the campaign of faults."""

from __future__ import annotations

import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import Forks, Run
from hub_server import WRITE, Fault, HubServer
from misbehaving import FAULTS, MisbehavingServer, hang
from wandb_server import WandbServer

from .kill import Subject
from .stage import PLANTED, Stage, digest

LATE = 0.01  # seconds to a reply of a server without a fault
LIMIT = 5  # seconds that a run waits for one reply, where the fault is that none comes


def stalls(server: MisbehavingServer, trickle: bool) -> Callable[[Any, dict[str, Any]], bool]:
    """A fault that never ends its reply: it sends a space now and then, which JSON allows, or nothing."""

    def fault(handler: Any, request: dict[str, Any]) -> bool:
        present = server.fault
        if trickle:
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", "1000000")
            handler.end_headers()
        while server.fault is present:
            if trickle:
                handler.wfile.write(b" ")
            threading.Event().wait(0.2)
        handler.close_connection = True
        return True

    return fault


def resets(handler: Any, request: dict[str, Any]) -> bool:
    """A fault that resets the connection (RST)."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True
    return True


def network_faults(server: MisbehavingServer) -> dict[str, Callable[[Any, dict[str, Any]], bool]]:
    """Everything that a server can do wrong, by name."""

    def stops(handler: Any, request: dict[str, Any]) -> bool:
        server.close()
        return FAULTS["hung up"](handler, request)

    # One of the answers in FAULTS shows a key, and is no fault otherwise.
    known = {name: fault for name, fault in FAULTS.items() if name != "the key as answer"}
    return {**known, "no reply": stalls(server, trickle=False), "a trickle": stalls(server, trickle=True),
            "connection reset": resets, "server stopped": stops}  # fmt: skip


def heal(server: MisbehavingServer) -> None:
    """End every fault of a server."""
    server.fault = hang(LATE)
    server.listen_again()


def in_trouble(
    forks: Forks, subject: Subject, server: MisbehavingServer, fault: Callable[[Any, dict[str, Any]], bool]
) -> Callable[[Path], Run]:
    """Return a function that starts a run whose server begins to fail at some request, and never recovers."""

    batch = "batch" in subject.name
    flags = ("--retries", "1", "--timeout", str(LIMIT)) if batch else ("--worker-timeout", str(LIMIT))

    def meet(folder: Path) -> Run:
        before = len(server.requests) + 12
        server.fault = lambda handler, request: len(server.requests) > before and fault(handler, request)
        run = forks.start(subject.script, *subject.first(folder), *flags)
        run.wait()
        return run

    return meet


def hub_breaks(stage: Stage, place: Path) -> None:
    """Let the Hub fail during an upload, in each of its requests once. Then run the command that continues it."""
    places = [("POST", "preupload"), ("POST", "lfs"), ("PUT", "lfs/object"), ("POST", "commit"), ("GET", "api/models")]
    with HubServer() as hub:
        env = {
            **PLANTED, "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITE, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(place / "hub-home"),
        }  # fmt: skip
        with Forks(place / "hub-logs", env) as forks:
            merged = place / "hub" / "merged"
            shutil.copytree(place / "reference-merge" / "merged", merged)
            for number, (method, part) in enumerate(places):
                for action in ("cut", 500):
                    stage.counts["faults"] += 1
                    stage.counts["faults: Hub fails in mid-upload"] += 1
                    flags = [
                        "--adapter-path", str(place / "reference-GRPO"), "--local-save-path", str(merged), "--repo-name",
                        f"user/planner-{number}-{action}", "--max-shard-size", "5MB",
                    ]  # fmt: skip
                    before = {path.name: digest(path) for path in merged.iterdir()}
                    hub.objects.clear()  # else what another repo was sent is not sent again
                    hub.faults[:] = [Fault(method, part, action, times=99)]
                    run = forks.start("merge_and_push.py", *flags)
                    code = run.wait()
                    lines = [line for line in run.text().splitlines() if line.startswith("merge_and_push.py: error:")]
                    if code not in (1, 2) or len(lines) != 1 or "Traceback" in run.text():
                        stage.fails(f"Hub, {method} {part} {action}: exit code {code}: {run.tail()}")
                    changed = [name for name, is_ in before.items() if digest(merged / name) != is_]
                    if set(changed) - {"README.md"}:
                        stage.fails(f"Hub, {method} {part} {action}: {changed} changed")
                    hub.faults.clear()
                    if forks.start("merge_and_push.py", *flags).wait() != 0:
                        stage.fails(f"Hub, {method} {part} {action}: the upload does not go on")
                    sent = {path.name for path in merged.iterdir()}
                    if not sent <= hub.repos[f"user/planner-{number}-{action}"].files.keys():
                        stage.fails(f"Hub, {method} {part} {action}: files are missing there")


def wandb_hangs(place: Path, subject: Subject, starts: bool) -> Callable[[Path], Run]:
    """Return a function that starts a run whose W&B server takes connections and does not answer.

    Args:
        place: folder for its printed text.
        subject: the command; its `--no-wandb` is left out.
        starts: whether the server answers until a run has started.
    """

    def meet(folder: Path) -> Run:
        flags = [flag for flag in subject.first(folder) if flag != "--no-wandb"]
        with WandbServer(starts) as server:
            env = {**PLANTED, "WANDB_MODE": "online", "WANDB_BASE_URL": server.url}
            with Forks(place / f"logs-{folder.name}", env, wandb=True) as forks:
                begun = time.monotonic()
                run = forks.start(subject.script, *flags)
                run.wait()
        print(f"W&B hangs: {time.monotonic() - begun:.0f} s, {subject.seconds:.0f} s without it", flush=True)
        return run

    return meet
