"""The manifests as kubectl would apply them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.manifests import OVERLAYS, render_overlay


@pytest.fixture(params=OVERLAYS)
def documents(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return render_overlay(request.param)


@pytest.fixture
def small() -> list[dict[str, Any]]:
    return render_overlay("small")
