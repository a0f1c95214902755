"""Tell whether the Hugging Face Hub can be reached, without a network its client retries for minutes; check names."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from dit_attn.errors import DitAttnError

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def is_offline() -> bool:
    """Tell whether only the local cache is available: the Hub is switched off, or does not answer within 5 s."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in _PROXIES):
        return False  # the proxy decides
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        return True
    return False


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository, before anything is computed that shall go there.

    Raises:
        DitAttnError: it is not ORG/NAME.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise DitAttnError(f"--push-to-hub must be ORG/NAME, got {name!r}")
