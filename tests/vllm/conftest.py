"""Fixtures: a kvring engine for the harness's tests, and a scene for those that drive the real vLLM."""

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from real.baseline import Baseline
from real.engine import binary
from real.models import model
from real.scene import Scene
from real.vllm import Zygote
from waiting import FOREVER_MS

if TYPE_CHECKING:
    import kvring

_numbers = itertools.count()


def pytest_addoption(parser):
    about = "try the tests themselves: without kvring, on a connector that is right"
    parser.addoption("--standin", action="store_true", help=about)


def pytest_configure(config):
    config.addinivalue_line("markers", "no_engine: needs nothing of kvring but a connector, so it runs with --standin too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--standin"):
        skip = pytest.mark.skip(reason="needs kvring")
        for item in items:
            if "scene" in item.fixturenames and "no_engine" not in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def engine() -> "Iterator[kvring.Engine]":
    """An engine for this test: nothing that another test has stored is found in it."""
    import kvring

    name = f"harness-{os.getpid()}-{next(_numbers)}"
    with kvring.Engine(name, "64MiB", start_timeout_s=FOREVER_MS / 1000) as started:
        yield started
    # An engine that has died has left its memory to a successor.
    subprocess.run([binary(), "remove", "--name", name], capture_output=True)


@pytest.fixture(scope="session")
def zygote():
    made = Zygote()
    yield made
    made.close()


@pytest.fixture(scope="session")
def baseline(zygote, tmp_path_factory):
    made = Baseline(zygote, tmp_path_factory.mktemp("baseline"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def llama():
    return model("llama")


@pytest.fixture(scope="session")
def gemma():
    return model("swa")


@pytest.fixture(scope="session")
def mistral():
    return model("mistral")


@pytest.fixture
def cold_scene(request, zygote, baseline, tmp_path):
    """A scene without a running engine."""
    standin = request.config.getoption("--standin")
    if not standin and shutil.which(binary()) is None:
        pytest.fail(f"there is no {binary()}: set KVRING_BINARY, or install the wheel")
    made = Scene(zygote, baseline, tmp_path, standin)
    yield made
    try:
        made.check()
    finally:
        made.close()


@pytest.fixture
def scene(cold_scene):
    """A scene with a running engine."""
    if not cold_scene.standin:
        cold_scene.engine.start()
    return cold_scene
