"""maturin, after building the command `kvring` and putting it where maturin takes a wheel's scripts from.

The extension and the command cannot come from one build: a panic must end the engine's process (profile `release`), and
must not end vLLM (profile `wheel`).

Zig links both against the symbols of glibc 2.28, whatever glibc the building machine has. So there is one kind of wheel: it
installs wherever glibc is 2.28 or later (RHEL 8, Debian 10, Ubuntu 18.10, and what came after them).
"""

import ctypes
import os
import pathlib
import platform
import shutil
import subprocess
import sys

from maturin import build_wheel as _build_wheel
from maturin import get_requires_for_build_wheel

# No hook for metadata alone: maturin wants the command to be there already.
__all__ = ["build_sdist", "build_wheel", "get_requires_for_build_wheel"]

HERE = pathlib.Path(__file__).resolve().parent
WORKSPACE = HERE.parent.parent
TARGET = f"{platform.machine()}-unknown-linux-gnu"
GLIBC = "2.28"


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    if not (WORKSPACE / "engine" / "cli" / "Cargo.toml").is_file():
        raise RuntimeError("kvring is built in its repository: pip install <repository>/adapter/python")
    # Both builds look for Zig in a Python's packages: in this one's, which has what pyproject.toml requires.
    os.environ["CARGO_ZIGBUILD_PYTHON_PATH"] = sys.executable
    put_command(build_command())
    arguments = ["--zig", "--target", TARGET, "--compatibility", f"manylinux_{GLIBC.replace('.', '_')}"]
    arguments += ["--", "-C", f"link-arg={unwinder()}"]
    return _build_wheel(wheel_directory, {**(config_settings or {}), "maturin.build-args": arguments}, metadata_directory)


def build_command():
    """Builds the command; where it is then."""
    package = ["--release", "--locked", "-p", "kvring"]
    subprocess.run(["cargo", "zigbuild", *package, "--target", f"{TARGET}.{GLIBC}"], cwd=WORKSPACE, check=True)
    # A relative directory is relative to where cargo runs.
    return WORKSPACE / (os.environ.get("CARGO_TARGET_DIR") or "target") / TARGET / "release" / "kvring"


def put_command(built):
    """Puts the command where maturin takes it from. Never written in place: it may be running."""
    scripts = HERE / "kvring.data" / "scripts"
    scripts.mkdir(parents=True, exist_ok=True)
    shutil.copy2(built, scripts / "kvring.new")
    (scripts / "kvring.new").replace(scripts / "kvring")


def unwinder():
    """Where libgcc_s is on this machine; rustc needs it too. Linked before Zig's own unwinder, it takes that one's place.

    When the interpreter ends, it ends the threads of daemons, and glibc unwinds them with libgcc_s, through frames of the
    extension. Where these belong to another unwinder, that is a segmentation fault.
    """
    ctypes.CDLL("libgcc_s.so.1")
    maps = pathlib.Path("/proc/self/maps").read_text()
    return next(line.split()[-1] for line in maps.splitlines() if line.endswith("/libgcc_s.so.1"))


def build_sdist(sdist_directory, config_settings=None):
    raise RuntimeError("kvring has no source distribution: pip install <repository>/adapter/python")
