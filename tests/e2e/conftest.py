"""A server of its own for each test, ended whatever happens."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mms_site import Site


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path / "site")
    yield site
    await asyncio.to_thread(site.end)
