"""What is told or kept holds no passwords: those in addresses and in the environment are cut."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # a shorter secret is also a word, and words may stand in names of files
SECRET_NAME = re.compile(
    r"passw(or)?d|secret|credential|api_?key|access_?key|auth_string|(^|_)token$", re.IGNORECASE
)
_USER_INFO = re.compile(r"://[^/\s]*@")
_IN_QUERY = re.compile(
    r"([?&]\w{0,40}(?:passw|secret|token|key)\w{0,40}=)[^&\s'\")]*", re.IGNORECASE
)


def redacted(text: str) -> str:
    """Return a text without passwords: in addresses, and those that the environment holds."""
    return _redacted(text, _secrets())


def without_user(address: str) -> str:
    """Return an address without user and password, so that it can be followed."""
    return _USER_INFO.sub("://", address)


def reason(error: Exception) -> str:
    """Return an error as one short line without passwords."""
    return redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:200]


def cleaned(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content for JSON: no passwords, no text called like one, no number but finite ones.

    Args:
        content: mappings, sequences, texts, numbers and booleans, nested.

    A number that is not finite becomes text that ``float`` reads.
    """
    secrets = _secrets()
    return {str(key): _cleaned(item, str(key), secrets) for key, item in content.items()}


def _cleaned(value: Any, name: str, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _cleaned(item, str(key), secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_cleaned(item, name, secrets) for item in value]
    if isinstance(value, str):
        # Of a dotted name the last part counts: a task may be called `secrets`.
        hidden = SECRET_NAME.search(name.rpartition(".")[2])
        return HIDDEN if hidden else _redacted(value, secrets)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _redacted(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return _IN_QUERY.sub(rf"\1{HIDDEN}", _USER_INFO.sub(f"://{HIDDEN}@", text))


def _secrets() -> list[str]:
    """Return the secrets in the environment, the longest first."""
    found = {value for name, value in os.environ.items() if SECRET_NAME.search(name)}
    for value in os.environ.values():
        user_info, at, _ = value.partition("://")[2].rpartition("@")
        if at:
            found.add(user_info.partition(":")[2])
    return sorted((s for s in found if len(s) >= SHORTEST), key=len, reverse=True)
