"""What every test finds as it was: the registries, which a test's own components would stay in."""

import pytest

from fasttrain.config import registry


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
