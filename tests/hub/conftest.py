"""A Hub for each test, and the client pointed at it, with a cache of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download, hf_api

from tests.hub.server import Hub, serving


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A fresh Hub; the client uploads as ada unless it is told otherwise."""
    with serving(tmp_path / "hub") as hub:
        point_at(hub.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        yield hub


def point_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE would do, had they been set before the client was imported."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before version 1
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage service is not the Hub


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its attempts; not here."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
