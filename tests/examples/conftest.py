"""Put the examples' folder on the path, and offer a recipe that needs no network."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from small_package import RECIPE
from weights import cache
from weights.recipes import Recipe


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The only recipe that there is, called as one of the tutorial's."""
    monkeypatch.setattr(cache, "RECIPES", {RECIPE.name: RECIPE})
    return RECIPE
