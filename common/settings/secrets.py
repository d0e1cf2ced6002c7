"""Keys and tokens: check them before use, and hide them in everything that this process shows.

`protect_process` registers every key found in the environment, the command line and logins. `redact` then removes
keys from a text: whole keys and parts of them, in plain text and in the encodings that libraries use. Everything
printed passes through it (`common.cli`), and so does everything that a server sends back.
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
_ADDRESSES = ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint", "wandb_base_url")  # may contain a password
_FLAG = re.compile(r"--?[\w-]*(key|token|secret|password)", re.IGNORECASE)
_PREFIXES = ("sk-", "hf_")  # how keys of OpenAI and the Hub begin; finds them also behind a misspelt flag

HIDDEN = "[key]"
# A run of this many characters of a key counts as a part of it. A shorter key is not hidden: it is a placeholder for a
# local server ("EMPTY", "none"), and hiding it would damage texts and numbers.
PART = 8

_parts: set[str] = set()  # every run of PART characters of every protected key, in each encoding


def clean_key(value: str | None, source: str) -> str | None:
    """Check and protect a key. Returns it without line breaks or spaces at its ends, or None if there is none.

    Args:
        value: the key as given.
        source: flag or variable that holds it, for the error message.

    Raises:
        UserError: if it contains characters that no key has. The message does not show the key.
    """
    if value is None or not value.strip():
        return None
    protect(value.strip())
    key = value.strip()
    if not all("!" <= char <= "~" for char in key):
        found = next(char for char in key if not "!" <= char <= "~")
        kind = "a space" if found == " " else "a control character" if found < " " or found == "\x7f" else "a letter"
        where = " inside" if kind != "a letter" else " that is not ASCII"
        without = {"-": "leave it out", "t": "log in again"}.get(source[0], "unset it")  # a flag, the login, a variable
        raise UserError(f"{source} cannot be a key: it has {kind}{where}: copy it again, or {without}")
    return key


def api_key(given: str | None) -> str | None:
    """The checked key of the servers: the one given, or else that of the environment; None if there is none.

    Raises:
        UserError: if it cannot be a key.
    """
    return clean_key(given, "--api-key") or clean_key(os.environ.get(OPENAI_VARIABLE), OPENAI_VARIABLE)


def api_key_problem(given: str | None = None) -> str | None:
    """The problem with the key of the servers, or None."""
    try:
        api_key(given)
    except UserError as error:
        return str(error)
    return None


def hub_token() -> str | None:
    """The checked Hub token of the environment, or else of the login; None if there is none.

    Raises:
        UserError: if it cannot be a token.
    """
    for name in (HUB_VARIABLE, "HUGGING_FACE_HUB_TOKEN"):
        if (token := clean_key(os.environ.get(name), name)) is not None:
            return token
    return clean_key(_login_token(), f"the login's token in {_login_file()}")


def protect(key: str) -> None:
    """Hide a key from now on, in each encoding. A key of fewer than eight characters is not hidden."""
    if len(key) < PART:
        return
    raw = key.encode("utf-8", "surrogateescape")
    forms = {key, quote(raw, safe=""), html.escape(key), raw.hex(), repr(key)[1:-1], repr(raw)[2:-1]}
    forms |= {json.dumps(key, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
    for before in range(3):  # base64 has three forms of a text, depending on its position in the whole
        text = base64.b64encode(b"\0" * before + raw).decode()
        inner = text[-(-before * 8 // 6) : (before + len(raw)) * 8 // 6]
        forms |= {inner, inner.translate(str.maketrans("+/", "-_"))}
    for form in forms:
        _parts.update(form[start : start + PART] for start in range(len(form) - PART + 1))


def redact(text: str) -> str:
    """The text without protected keys and parts of them."""
    if not _parts:
        return text
    pieces: list[str] = []
    end = 0
    for start in range(len(text) - PART + 1):
        if text[start : start + PART] in _parts:
            if start > end or not pieces:  # otherwise it continues the previous part
                pieces += [text[end:start], HIDDEN]
            end = start + PART
    return "".join([*pieces, text[end:]])


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the first 160 characters of its message, without secrets."""
    lines = redact(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


def redact_logs(folder: Path) -> None:
    """Remove keys from the log files that a library's process wrote below a folder; no error if there are none."""
    for path in folder.rglob("*.log"):
        if path.is_symlink():
            continue  # a link to another log
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = redact(text)
        if clean != text:
            path.write_text(clean, encoding="utf-8", errors="surrogateescape")


def scrub(error: BaseException) -> None:
    """Remove keys from an error and from the errors that caused it, wherever they keep text."""
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
    """Protect every key in the environment, the command line and logins. Trim white space of those in the environment.

    An invalid key is reported by `clean_key` when it is used, not here, because not every command needs every key.
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
    """The password in `http://name:password@host`, or "" if there is none."""
    found = re.search(r"//[^/@:]*:(.*)@", address)
    return found[1] if found else ""


def _in_logins() -> Iterator[str]:
    yield _login_token() or ""
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")  # W&B stores its key here
    try:
        hosts = netrc.netrc(str(path)).hosts
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return  # a login that cannot be read contains no usable key
    for _, _, password in hosts.values():
        yield password or ""


def _login_file() -> Path:
    """File of the token that `hf auth login` stores, by the rule of huggingface_hub, without importing it."""
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
