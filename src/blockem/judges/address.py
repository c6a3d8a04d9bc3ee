"""Where a server is and the key to it: the one place that touches secrets, and that keeps them out of everything shown."""

from __future__ import annotations

import base64
import os
from urllib.parse import unquote, urlsplit

from blockem.errors import BlockemError

SERVER = ("http://", "https://")
"""What the address of a judge's server begins with."""


def judge_named(name: str, what: str) -> str:
    """A judge's name as it is used: no blanks around it, and the scheme of a server's address in small letters.

    What else looks like an address may hold a password, so it is refused here and never repeated; a later message would.

    Args:
        what: the field or option that the name was given by.

    Raises:
        BlockemError: it looks like an address but cannot be used as one.
    """
    scheme, mark, rest = name.strip().partition("://")
    whole = f"{scheme.casefold()}{mark}{rest}"
    if whole.startswith(SERVER):
        Address(whole, "OPENAI_API_KEY")
        return whole
    if mark or "@" in scheme:
        raise BlockemError(
            f"{what} looks like an address, but does not begin with http:// or https://; "
            "give a server's address in full, and a judge's folder by a path without :// and @"
        )
    return scheme


class Address:
    """A base URL and the name of the environment variable that holds the key.

    The key is read when it is needed and not kept. Credentials in the URL are sent as basic authorisation, so that no library logs them
    with the address; `shown` is the URL without them.
    """

    def __init__(self, url: str, api_key_env: str) -> None:
        self.api_key_env = api_key_env
        try:
            parts = urlsplit(url.strip())
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        if not sound:
            raise BlockemError("the judge's base URL cannot be used; give it as http://host:port/v1 or https://host/v1")
        if parts.query or parts.fragment:
            raise BlockemError("the judge's base URL must have no ? or #; put a key into the environment, not into the URL")
        host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else str(parts.hostname)
        self.shown = f"{parts.scheme}://{host}{f':{parts.port}' if parts.port else ''}{parts.path}".rstrip("/")
        user, password = parts.username or "", parts.password or ""
        self._basic = f"{unquote(user)}:{unquote(password)}" if user or password else ""
        self._secrets = [secret for secret in (self._basic, password, unquote(password), "" if password else unquote(user)) if secret]

    @property
    def has_credentials(self) -> bool:
        """Whether the URL itself held a user or a password."""
        return bool(self._basic)

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"

    def headers(self) -> dict[str, str]:
        """Basic authorisation, if the URL had credentials."""
        return {"Authorization": "Basic " + base64.b64encode(self._basic.encode()).decode()} if self._basic else {}

    def key(self) -> str:
        """The key. A server on one's own machine needs none, but the client insists on one."""
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise BlockemError(f"the environment variable {self.api_key_env} holds characters that no key has; set it again")
        return key or "no-key"

    def hide(self, text: str) -> str:
        """`text` without the key and without the credentials of the URL, in case a server echoes them."""
        for secret in [os.environ.get(self.api_key_env, "").strip(), *self._secrets]:
            if len(secret) > 3:  # shorter ones are no secrets, and would eat holes into ordinary words
                text = text.replace(secret, "***")
        return text
