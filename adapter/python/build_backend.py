"""maturin, after building the command `kvring` and putting it where maturin takes a wheel's scripts from.

The extension and the command cannot come from one build: a panic must end the engine's process (profile `release`), and
must not end vLLM (profile `wheel`).
"""

import os
import pathlib
import shutil
import subprocess

from maturin import build_wheel as _build_wheel
from maturin import get_requires_for_build_wheel

# No hook for metadata alone: maturin wants the command to be there already.
__all__ = ["build_sdist", "build_wheel", "get_requires_for_build_wheel"]

HERE = pathlib.Path(__file__).resolve().parent
WORKSPACE = HERE.parent.parent


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    if not (WORKSPACE / "engine" / "cli" / "Cargo.toml").is_file():
        raise RuntimeError("kvring is built in its repository: pip install <repository>/adapter/python")
    subprocess.run(["cargo", "build", "--release", "--locked", "-p", "kvring"], cwd=WORKSPACE, check=True)
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR") or "target")
    scripts = HERE / "kvring.data" / "scripts"
    scripts.mkdir(parents=True, exist_ok=True)
    # A relative directory is relative to where cargo runs. Never written in place: it may be running.
    shutil.copy2(WORKSPACE / target / "release" / "kvring", scripts / "kvring.new")
    (scripts / "kvring.new").replace(scripts / "kvring")
    return _build_wheel(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    raise RuntimeError("kvring has no source distribution: pip install <repository>/adapter/python")
