"""One checkpoint of each architecture, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest
from zoo import save_architecture


@pytest.fixture(scope="session")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """architecture(name) -> its checkpoint directory. Read only."""
    place = tmp_path_factory.mktemp("zoo")

    def get(name: str) -> Path:
        return place / name if (place / name).exists() else save_architecture(name, place / name)

    return get
