"""Whether the hub can be reached is known within seconds."""

import socket
import urllib.request

import pytest

from fasttrain.runtime import hub


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    hub.hub_reachable.cache_clear()
    yield
    hub.hub_reachable.cache_clear()


@pytest.fixture
def port():
    """A port that is listened to while the test runs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_hub_that_listens(monkeypatch, port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert hub.hub_reachable()


def test_a_hub_that_does_not(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed}")
    assert not hub.hub_reachable()


def test_offline_by_choice(monkeypatch, port):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub.hub_reachable()


def test_behind_a_proxy_the_client_finds_out(monkeypatch):
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert hub.hub_reachable()
