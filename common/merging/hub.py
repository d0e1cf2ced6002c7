"""Push a folder to the Hugging Face Hub: check the permission early, and continue an interrupted upload.

The endpoint is huggingface_hub's own setting, HF_ENDPOINT.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from common.cli import say
from common.errors import UserError
from common.settings import secrets

if TYPE_CHECKING:
    from huggingface_hub import HfApi


T = TypeVar("T")
SECONDS = 120.0  # limit for each wait for the Hub's reply; the library has none
WAITS = (1, 2, 4)  # seconds before the second, third and fourth attempt
# huggingface_hub itself repeats these requests for half a minute; other requests it sends once.
REPEATED_BY_LIBRARY = ("/preupload/", "/info/lfs/", "/lfs/")


def api_for(token: str | None) -> HfApi:
    """A client of the Hub, with the given token, or else that of the environment or the login.

    Raises:
        UserError: if there is no token, it contains characters that no token has, or the library is set offline.
    """
    import httpx2
    from huggingface_hub import HfApi, constants, get_token, set_client_factory
    from huggingface_hub.utils._http import default_client_factory
    from huggingface_hub.utils.tqdm import disable_progress_bars

    def client() -> httpx2.Client:
        made = default_client_factory()
        made.timeout = httpx2.Timeout(SECONDS)
        return made

    set_client_factory(client)

    if not sys.stderr.isatty():
        disable_progress_bars()
    # get_token comes last: it also knows logins other than the environment and the login file.
    found = secrets.clean_key(token, "--token") or secrets.hub_token() or secrets.clean_key(get_token(), "the login")
    if not found:
        raise UserError(
            "no Hub token found to push with: set HF_TOKEN, run `hf auth login`, pass --token, or keep the model "
            "local with --no-push"
        )
    if constants.HF_HUB_OFFLINE:
        name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
        raise UserError(f"{name} is set, so nothing can be pushed: unset it, or keep the model local with --no-push")
    return HfApi(token=found)


def check_push(api: HfApi, repo_name: str, *, private: bool) -> str:
    """Ask the Hub whether this token may write to the repo, without creating it.

    Args:
        api: from `api_for`.
        repo_name: `name` or `owner/name`.
        private: whether a new repo would be private.

    Returns:
        Full id of the repo, `owner/name`.

    Raises:
        UserError: with exit code 2 if the token may not write, 1 if the Hub cannot be asked.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        user = repeated(api.whoami, "who the token belongs to")
        repo_id = repo_name if "/" in repo_name else f"{user['name']}/{repo_name}"
        try:
            repeated(lambda: api.auth_check(repo_id, write=True), f"whether the token may write to {repo_id}")
            existing = repeated(lambda: api.model_info(repo_id), f"whether {repo_id} is private")
        except RepositoryNotFoundError:
            _check_may_create(user, repo_id)
            return repo_id
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain(error, repo_name, api.endpoint), exit_code=2 if _refused(error) else 1) from error
    if private and not existing.private:
        raise UserError(
            f"{repo_id} exists and is public, so --private would not keep the model private: make it private in its "
            "settings on the Hub, or name a new repo"
        )
    return repo_id


def _check_may_create(user: dict[str, Any], repo_id: str) -> None:
    """Check with the answer of whoami whether the token may create a repo that does not exist yet."""
    owner = repo_id.split("/")[0]
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(
            f"this Hub token can only read, so it cannot create {repo_id}: make one with write permission at "
            "https://huggingface.co/settings/tokens, or use --no-push"
        )
    organisations = {entry["name"]: entry.get("roleInOrg") for entry in user.get("orgs", [])}
    if owner != user["name"] and organisations.get(owner) in (None, "read"):
        where = ", ".join(name for name in (user["name"], *organisations) if organisations.get(name) != "read")
        raise UserError(f"this Hub token cannot create {repo_id}: it may write to {where}: name a repo there")
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        writable = {scope["entity"].get("name") for scope in scopes if "repo.write" in scope["permissions"]}
        if not writable & {owner, repo_id}:
            raise UserError(
                f"this fine-grained Hub token has no write permission for {owner}, so it cannot create {repo_id}: "
                "add it at https://huggingface.co/settings/tokens, or use --no-push"
            )


def push(api: HfApi, folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Create the repo if it does not exist, and upload every file of a folder.

    Files and parts that the Hub already has are not sent again, so a second call continues the first.

    Args:
        api: from `api_for`.
        folder: to upload.
        repo_id: `owner/name`.
        private: whether to create the repo as private.
        message: of the commit.

    Returns:
        URL of the repo.

    Raises:
        UserError: with exit code 1, if a request fails for good.
    """
    try:
        # None instead of False: the default of an organisation may be private.
        repeated(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), f"to create {repo_id}")
        repeated(
            lambda: api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, ignore_patterns=[".*"]
            ),
            f"to upload to {repo_id}",
        )
    except Exception as error:
        raise UserError(explain(error, repo_id, api.endpoint), exit_code=1) from error
    return f"{api.endpoint}/{repo_id}"


def repeated(request: Callable[[], T], what: str) -> T:
    """Send a request, again after a temporary failure: a server error, a conflict, a broken connection.

    Args:
        request: sends it.
        what: completes the message of a retry, such as "to create user/name".

    Returns:
        The result of `request`. Its last error is raised again.
    """
    for wait in WAITS:
        try:
            return request()
        except Exception as error:
            if not _passing(error):
                raise
            say(f"asking the Hub {what}: {_outcome(error)}, again in {wait} s")
            time.sleep(wait)
    return request()


def _passing(error: Exception) -> bool:
    """Whether an error is temporary, and the library does not repeat the request itself."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        url = str(error.response.request.url)
        again = error.response.status_code in (408, 409, 429) or error.response.status_code >= 500
        return again and not any(part in url for part in REPEATED_BY_LIBRARY)
    # One that hangs is not waited for four times.
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.TimeoutException)


def _root(error: BaseException) -> BaseException:
    """The error behind the library's own wrapper."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """The first HTTP status in a chain of errors."""
    current: BaseException | None = error
    while current is not None:
        status = getattr(getattr(current, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        current = current.__cause__
    return None


def _refused(error: BaseException) -> bool:
    return _status(error) in (401, 403, 404)


def _outcome(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"it answered {status}"
    root = _root(error)
    lines = str(root).strip().splitlines()
    return secrets.redact(f"{type(root).__name__}: {lines[0][:120]}" if lines else type(root).__name__)


def explain(error: BaseException, repo: str, endpoint: str) -> str:
    """The meaning of a failed request in one line, with the Hub's own reason if it gives one.

    Args:
        error: of the request.
        repo: the repo that it was about.
        endpoint: address of the Hub.
    """
    secrets.scrub(error)
    status = _status(error)
    said = _reason(error)
    detail = f" ({secrets.redact(said)})" if said else ""
    known = {
        400: f"the Hub refuses what was sent{detail}: correct it (--model-card for the card's metadata) and try again",
        401: f"the Hub does not accept the token{detail}: check HF_TOKEN or --token, or run `hf auth login`",
        403: f"the token may not write to {repo}{detail}: use one with write permission, or another --repo-name",
        404: f"the Hub does not know {repo}, or hides it from this token{detail}: check --repo-name and the token",
        409: f"{repo} is being changed by someone else{detail}: wait for that to end",
    }
    if status in known:
        return known[status]
    return f"the Hub at {endpoint} failed ({_outcome(error)}){detail}: check the network, or try later"


def _reason(error: BaseException) -> str:
    """The Hub's own message in a chain of errors, in one line; "" if there is none."""
    current: BaseException | None = error
    while current is not None:
        response = getattr(current, "response", None)
        said = getattr(current, "server_message", None) or getattr(response, "headers", {}).get("X-Error-Message")
        # For a refused model card the library raises a plain ValueError, whose text holds the Hub's reasons.
        if not said and response is None and isinstance(current, ValueError) and _status(current) is not None:
            said = str(current)
        if said:
            return " ".join(str(said).split())[:300]
        current = current.__cause__
    return ""
