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
from real.scene import Scene
from real.vllm import Zygote
from waiting import FOREVER_MS

if TYPE_CHECKING:
    import kvring

_numbers = itertools.count()


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


@pytest.fixture
def cold_scene(zygote, baseline, tmp_path):
    """A scene without a running engine."""
    if shutil.which(binary()) is None:
        pytest.fail(f"there is no {binary()}: set KVRING_BINARY, or install the wheel")
    made = Scene(zygote, baseline, tmp_path)
    yield made
    try:
        made.check()
    finally:
        made.close()


@pytest.fixture
def scene(cold_scene):
    """A scene with a running engine."""
    cold_scene.engine.start()
    return cold_scene
