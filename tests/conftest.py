"""What every test finds as it was: the registries, which a test's own components would stay in."""

import pytest

from fasttrain.config import registry


@pytest.fixture(autouse=True)
def registries_as_they_were():
    before = {kind: dict(each._registered) for kind, each in registry.REGISTRIES.items()}
    files = dict(registry.IMPORTED_FILES)
    yield
    for kind, each in registry.REGISTRIES.items():
        each._registered = before[kind]
    registry.IMPORTED_FILES.clear()
    registry.IMPORTED_FILES.update(files)
