"""Keys and tokens: cleaned and checked before they are used, and hidden in all that this process shows.

Every key the process knows of is registered here, once: `protect_process` does so for what environment, command
line and logins hold. `redact` then takes keys out of a text, whole or in parts, plain or as libraries quote them;
everything printed passes through it (`common.cli`), and so does everything a server sends back.
"""

from __future__ import annotations

import base64
import html
import json
import netrc
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from common.errors import UserError

OPENAI_VARIABLE, HUB_VARIABLE, WANDB_VARIABLE = "OPENAI_API_KEY", "HF_TOKEN", "WANDB_API_KEY"
_VARIABLES = (OPENAI_VARIABLE, HUB_VARIABLE, "HUGGING_FACE_HUB_TOKEN", WANDB_VARIABLE)
_ADDRESSES = ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint", "wandb_base_url")  # may hold a password
_FLAG = re.compile(r"--?[\w-]*(key|token|secret|password)", re.IGNORECASE)
_PREFIXES = ("sk-", "hf_")  # of OpenAI's and the Hub's keys, also where a flag is misspelt

HIDDEN = "[key]"
# As many characters of a key in a row are taken for a part of it. A shorter "key" is no secret but what a local
# server is happy with ("EMPTY", "none"): hiding that everywhere would mutilate texts, and numbers.
PART = 8

_parts: set[str] = set()  # each PART characters of every protected key, in every way of writing it


def clean_key(value: str | None, source: str) -> str | None:
    """A key without the line break or spaces that copying leaves at its ends, protected; None where there is none.

    Args:
        value: as it was given.
        source: the flag or variable it came from, for the error.

    Raises:
        UserError: for characters that no key has. It does not show the key.
    """
    if value is None or not value.strip():
        return None
    protect(value.strip())
    key = value.strip()
    if not all("!" <= char <= "~" for char in key):
        found = next(char for char in key if not "!" <= char <= "~")
        kind = "a space" if found == " " else "a control character" if found < " " or found == "\x7f" else "a letter"
        where = " inside" if kind != "a letter" else " that is not ASCII"
        raise UserError(f"{source} cannot be a key: it has {kind}{where}: copy it again, or unset it")
    return key


def api_key(given: str | None) -> str | None:
    """The key of the servers: the one given, else the environment's, cleaned and checked.

    Raises:
        UserError: where it cannot be one.
    """
    return clean_key(given, "--api-key") or clean_key(os.environ.get(OPENAI_VARIABLE), OPENAI_VARIABLE)


def api_key_problem(given: str | None = None) -> str | None:
    """What is wrong with the key of the servers, or None."""
    try:
        api_key(given)
    except UserError as error:
        return str(error)
    return None


def hub_token() -> str | None:
    """The Hub token of the environment, else of the login, cleaned and checked.

    Raises:
        UserError: where it cannot be one.
    """
    for name in (HUB_VARIABLE, "HUGGING_FACE_HUB_TOKEN"):
        if (token := clean_key(os.environ.get(name), name)) is not None:
            return token
    return clean_key(_login_token(), f"the login's token in {_login_file()}")


def protect(key: str) -> None:
    """Hide a key from now on, however it is written; one of fewer than eight characters is none."""
    if len(key) < PART:
        return
    raw = key.encode("utf-8", "surrogateescape")
    forms = {key, quote(raw, safe=""), html.escape(key), raw.hex(), repr(key)[1:-1], repr(raw)[2:-1]}
    forms |= {json.dumps(key, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    for before in range(3):  # base64 writes a text in one of three ways, by where in the whole it stands
        text = base64.b64encode(b"\0" * before + raw).decode()
        inner = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        forms |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    for form in forms:
        _parts.update(form[start : start + PART] for start in range(len(form) - PART + 1))


def redact(text: str) -> str:
    """A text without the protected keys and without parts of them."""
    if not _parts:
        return text
    pieces: list[str] = []
    end = 0
    for start in range(len(text) - PART + 1):
        if text[start : start + PART] in _parts:
            if start > end or not pieces:  # else it goes on from the part before
                pieces += [text[end:start], HIDDEN]
            end = start + PART
    return "".join([*pieces, text[end:]])


def redact_logs(folder: Path) -> None:
    """Take keys out of the logs that a library's own process has written below a folder, where there are any."""
    for path in folder.rglob("*.log"):
        if path.is_symlink():
            continue  # to another one
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = redact(text)
        if clean != text:
            path.write_text(clean, encoding="utf-8", errors="surrogateescape")


def scrub(error: BaseException) -> None:
    """Take keys out of an error and of those that led to it, wherever their text is kept."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        link.args = tuple(_scrubbed(value) for value in link.args)
        for name, value in list(vars(link).items()):
            if isinstance(value, (str, bytes, dict, list)):
                link.__dict__[name] = _scrubbed(value)


def protect_process(argv: Sequence[str]) -> None:
    """Protect every key that environment, command line and logins hold, and clean those of the environment.

    A key that cannot be one is told by `clean_key` where it is used, not here: not every command needs each.
    """
    for name in _VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            os.environ[name] = value.strip()
            protect(value.strip())
    for key in (*_on_command_line(argv), *_in_addresses(), *_in_logins()):
        protect(key.strip())


def _on_command_line(argv: Sequence[str]) -> Iterator[str]:
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if _FLAG.fullmatch(flag):
            yield value if equals else "".join(argv[place + 1 : place + 2])
        elif (value or word).startswith(_PREFIXES):
            yield value or word
        yield _password(word)


def _in_addresses() -> Iterator[str]:
    for name, value in os.environ.items():
        if name.lower() in _ADDRESSES:
            yield _password(value)


def _password(address: str) -> str:
    """The password in `http://name:password@host`, "" where there is none."""
    found = re.search(r"//[^/@:]*:(.*)@", address)
    return found[1] if found else ""


def _in_logins() -> Iterator[str]:
    yield _login_token() or ""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")  # where W&B keeps its key
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return  # what cannot be read is used by nobody
    for _, _, password in hosts.values():
        yield password or ""


def _login_file() -> Path:
    """Where `hf auth login` keeps its token: huggingface_hub's own rule, without its import."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    return Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or f"{home}/token")).expanduser()


def _login_token() -> str | None:
    try:
        return _login_file().read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None  # not logged in


def _scrubbed(value: object) -> object:
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, bytes):
        return redact(value.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {name: _scrubbed(entry) for name, entry in value.items()}
    return [_scrubbed(entry) for entry in value] if isinstance(value, list) else value
