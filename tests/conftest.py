"""What every test finds as it was: the registries, which a test's own components would stay in, and
no kernel cache of anybody's."""

import os
import shutil
import tempfile

import pytest

from fasttrain.config import registry

CACHE = "FASTTRAIN_CACHE"


def pytest_configure(config):
    """A cache of the session's own, which its workers and the commands it runs share."""
    if not hasattr(config, "workerinput"):
        os.environ[CACHE] = config.fasttrain_cache = tempfile.mkdtemp(prefix="fasttrain-tests-")


def pytest_unconfigure(config):
    if hasattr(config, "fasttrain_cache"):
        shutil.rmtree(config.fasttrain_cache, ignore_errors=True)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A folder that holds what is known of kernels in this test alone; nothing is remembered."""
    from fasttrain_kernels.registry import OPS

    def forget():
        for op in OPS.values():
            op.forget()

    folder = tmp_path / "kernel-cache"
    monkeypatch.setenv(CACHE, str(folder))
    forget()
    yield folder
    OPS.pop("toy", None)
    forget()


def pytest_collection_modifyitems(items):
    """The longest first, so that no core is left with one of them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def registries_as_they_were():
    before = {kind: dict(each._registered) for kind, each in registry.REGISTRIES.items()}
    files = dict(registry.IMPORTED_FILES)
    yield
    for kind, each in registry.REGISTRIES.items():
        each._registered = before[kind]
    registry.IMPORTED_FILES.clear()
    registry.IMPORTED_FILES.update(files)
