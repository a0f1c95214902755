"""Whether the Hugging Face Hub can be reached: without a network its client retries for minutes before it says so."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

_PROXIES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")


def out_of_reach() -> bool:
    """Whether only the local cache can be asked: the Hub was switched off, or does not answer within five seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if any(os.environ.get(name) for name in _PROXIES):
        return False  # the way there is the proxy's
    place = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((place.hostname or "", place.port or 443), timeout=5).close()
    except OSError:
        return True
    return False
