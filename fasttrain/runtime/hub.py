"""Whether the Hugging Face hub can be reached, asked before its client retries for 23 seconds."""

from __future__ import annotations

import functools
import os
import socket
import urllib.request
from urllib.parse import urlsplit

SECONDS = 3.0
_OFFLINE = {"1", "ON", "YES", "TRUE"}  # as huggingface_hub reads its switches


@functools.cache
def hub_reachable() -> bool:
    """One connection attempt per process. Behind a proxy, where no attempt of ours would show
    anything, the answer is yes, and the client finds out."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _OFFLINE:
        return False
    if urllib.request.getproxies().get("https"):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
