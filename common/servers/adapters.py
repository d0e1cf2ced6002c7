"""Versions of one adapter on vLLM servers: the planner in training, published again after every optimiser step.

Each version has a new name and a new folder. vLLM can also replace an adapter under its old name, but this has two
disadvantages. It then reads the adapter from disk for every later request. And the key of its prefix cache is name and
path, so it may return keys and values of the older version.

A version is loaded on all servers or on none.

The servers read the folder themselves, so its path must be the same for them and for this process.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from common.errors import UserError
from common.servers.client import Server, ServerError

PREFIX = "planner-"  # beginning of all versions' names; it identifies versions that an earlier run left on a server
PAUSE_SECONDS = 2.0  # between two checks whether a server is back
_SERVER_FLAGS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"


class AdapterServers:
    """The current version of an adapter on one or several servers.

    Args:
        servers: servers that do not retry by themselves; all share one runner.
        folder: parent of the versions' folders, on a disk that the servers see under the same path.
        patience: seconds that a server may be away, for example to restart, before the call fails.
    """

    def __init__(self, servers: Sequence[Server], folder: Path, *, patience: float) -> None:
        self.servers = list(servers)
        self.current: str | None = None
        self._folder = folder.absolute()
        self._patience = patience
        self._run = secrets.token_hex(4)
        self._count = 0
        self._outdated: Path | None = None  # folder of the previous version, which a server may still be reading

    def publish(self, save: Callable[[Path], None]) -> str:
        """Save a new version, load it on all servers, and unload the version before it.

        Args:
            save: writes adapter_config.json and adapter_model.safetensors into the folder that it receives.

        Returns:
            Name of the new version.

        Raises:
            UserError: if a server does not load it. Then no server has it, and the old version is still current. Also
                raised if the folder cannot be written.
        """
        self._count += 1
        name = f"{PREFIX}{self._run}-{self._count}"
        folder = self._folder / name
        try:
            folder.mkdir(parents=True)
            save(folder)
        except OSError as error:
            raise UserError(
                f"--vllm-adapter-dir {self._folder} cannot be written ({error.strerror}): name another folder"
            ) from error
        before, self.current = self.current, name
        try:
            self._on_all(self._load)
        except UserError:
            self._on_all(lambda server: self._unload(server, name))
            self.current = before
            shutil.rmtree(folder)
            raise
        if before is not None:
            self._on_all(lambda server: self._unload(server, before))
        if self._outdated is not None:
            shutil.rmtree(self._outdated, ignore_errors=True)
        self._outdated = None if before is None else self._folder / before
        return name

    async def restore(self, server: Server) -> None:
        """Wait until a failed server answers again, and load the current version if it lacks it.

        A restarted server has lost the version.

        Raises:
            ServerError: if the server stays away for too long, or does not load the version.
        """
        await self._load(server)

    def clear(self) -> None:
        """Unload and delete versions that earlier runs left in the same folder, for example after a kill."""

        async def stale(server: Server) -> None:
            for model in await server.models():
                if model.name.startswith(PREFIX) and Path(model.root or "").parent == self._folder:
                    await self._unload(server, model.name)

        self._on_all(stale)
        self._delete_folders()

    def close(self) -> None:
        """Unload the current version and delete all folders."""
        if self.current is not None:
            name, self.current = self.current, None
            self._on_all(lambda server: self._unload(server, name))
        self._delete_folders()

    def _delete_folders(self) -> None:
        for folder in self._folder.glob(f"{PREFIX}*"):
            shutil.rmtree(folder, ignore_errors=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _on_all(self, work: Callable[[Server], Awaitable[None]]) -> None:
        """Run `work` on all servers at once. An error is raised only after all have finished."""

        async def together() -> None:
            done = await asyncio.gather(*map(work, self.servers), return_exceptions=True)
            for failure in (outcome for outcome in done if outcome is not None):
                raise failure

        self.servers[0].run(together())

    async def _load(self, server: Server) -> None:
        assert self.current is not None
        body = {"lora_name": self.current, "lora_path": str(self._folder / self.current)}
        end = time.monotonic() + self._patience
        while True:
            try:
                if any(model.name == self.current for model in await server.models()):
                    return
                await server.post("/load_lora_adapter", body)
            except ServerError as error:
                if "already been loaded" in _told(error):
                    return  # another process of the run has loaded it
                refused = load_problem(server, error, self._folder)
                if refused is not None:
                    raise refused from error
                if not _is_away(error) or time.monotonic() >= end:
                    raise
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                return

    async def _unload(self, server: Server, name: str) -> None:
        try:
            await server.post("/unload_lora_adapter", {"lora_name": name})
        except ServerError:
            # The version is gone already, or the server is away. That is harmless: each request names its version, and
            # the server drops the oldest one when it needs room.
            return


async def check_takes_adapters(server: Server) -> None:
    """Check that adapters can be loaded while the server runs, by asking for one that does not exist.

    Raises:
        UserError: if they cannot; the message says which flags the server needs.
    """
    missing = Path("/nonexistent") / secrets.token_hex(4)
    try:
        await server.post("/load_lora_adapter", {"lora_name": missing.name, "lora_path": str(missing)})
    except ServerError as error:
        if missing.name in _told(error):
            return
        raise load_problem(server, error, missing) or error from error
    raise UserError(f"--vllm-url {server.endpoint.url} loads adapters that do not exist: what answers is no vLLM")


def load_problem(server: Server, error: ServerError, folder: Path) -> UserError | None:
    """The reason why a server refused to load an adapter, and what to do; None if the error is no refusal.

    Args:
        server: the client.
        error: of the request.
        folder: of the adapter, for the message.
    """
    told, where = _told(error), f"--vllm-url {server.endpoint.url}"
    lower = told.casefold()
    if "max_lora_rank" in lower:
        return UserError(f"{where}: {_first_line(told)}: restart the server with a --max-lora-rank that holds --lora-r")
    if "lora is not enabled" in lower:
        return UserError(f"{where} runs without --enable-lora: restart it with that, and with {_SERVER_FLAGS}")
    if status_of(error) != 404:
        return None
    if "adapter" in lower:
        return UserError(
            f"{where} does not see the adapter's folder in {folder}: --vllm-adapter-dir must be on a disk that the "
            "server has under the same path"
        )
    return UserError(f"{where} cannot load adapters while it runs: restart it with {_SERVER_FLAGS}")


def status_of(error: ServerError) -> int | None:
    """HTTP status behind an error, or None if there was no reply."""
    return getattr(error.__cause__, "status_code", None)


def _is_away(error: ServerError) -> bool:
    """Whether the server may be restarting, or behind a gateway that cannot reach it."""
    return error.retryable and status_of(error) in (None, 429, 502, 503, 504)


def _told(error: ServerError) -> str:
    """The full text of a server's error message."""
    return str(getattr(error.__cause__, "body", None) or error)


def _first_line(text: str) -> str:
    """The part of vLLM's message about the LoRA rank that a user needs."""
    start = max(text.find("LoRA rank"), 0)
    return text[start:].split(".")[0][:160]
