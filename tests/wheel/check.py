"""Checks a wheel of kvring as somebody gets it who has no Rust: `tests/wheel/check.py WHEEL`.

Its name says that it is for glibc 2.28 and later, and what is inside needs nothing newer. It is small. Installed in an empty
environment, without anything else in PATH, it has the command `kvring`, and runs the example `examples/client.py`.
"""

import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TAG = f"cp310-abi3-manylinux_2_28_{platform.machine()}"
GLIBC = (2, 28)
BYTES_MAX = 10_000_000
# What every Linux with glibc has.
LIBRARIES = re.compile(r"(lib(c|m|dl|rt|pthread|gcc_s)|ld-linux-[\w-]+)\.so\.\d")


def wrong_in_name(wheel: Path) -> Iterator[str]:
    if not re.fullmatch(rf"kvring-[^-]+-{TAG}\.whl", wheel.name):
        yield f"{wheel.name}: expected kvring-VERSION-{TAG}.whl"
    if wheel.stat().st_size > BYTES_MAX:
        yield f"{wheel.name} has {wheel.stat().st_size} bytes, expected at most {BYTES_MAX}"


def wrong_in_program(program: Path) -> Iterator[str]:
    """What the dynamic linker of an old machine would miss."""
    read = ["readelf", "--wide", "--dynamic", "--version-info", program]
    said = subprocess.run(read, env={**os.environ, "LC_ALL": "C"}, stdout=subprocess.PIPE, text=True, check=True).stdout
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", said):
        if not LIBRARIES.fullmatch(library):
            yield f"{program.name} needs {library}"
    # Of the versions that it needs; it defines none.
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"Name: GLIBC_([\d.]+)", said)}
    if not versions:
        yield f"{program.name}: readelf shows no version of glibc that it needs"
    for version in sorted(versions):
        if version > GLIBC:
            yield f"{program.name} needs GLIBC_{'.'.join(map(str, version))}"


def wrong_in_programs(unpacked: Path) -> Iterator[str]:
    programs = [*unpacked.glob("kvring/*.so"), *unpacked.glob("kvring-*.data/scripts/kvring")]
    if len(programs) != 2:
        yield f"expected the extension and the command, found {programs}"
    for program in programs:
        yield from wrong_in_program(program)


def use(wheel: Path, environment: Path) -> None:
    """Installs the wheel, and uses it. Nothing but the environment is in PATH: no Rust, and no other kvring."""
    venv.create(environment, with_pip=True)
    alone = {"PATH": str(environment / "bin"), "PYTHONDONTWRITEBYTECODE": "1"}
    pip = ["install", "--quiet", "--disable-pip-version-check", "--no-index", str(wheel)]
    python, kvring = environment / "bin" / "python", environment / "bin" / "kvring"
    example = [ROOT / "tests" / "examples.py", kvring, python, ROOT / "examples" / "client.py"]
    for command in [[environment / "bin" / "pip", *pip], [kvring, "--version"], [python, *example]]:
        subprocess.run(command, cwd=environment, env=alone, check=True)


def main(file: str) -> str | None:
    """What is wrong, for `sys.exit`."""
    wheel = Path(file).resolve()
    print(f"   {wheel.name}: {wheel.stat().st_size} bytes")
    with tempfile.TemporaryDirectory() as scratch:
        unpacked = Path(scratch) / "unpacked"
        zipfile.ZipFile(wheel).extractall(unpacked)
        wrong = [*wrong_in_name(wheel), *wrong_in_programs(unpacked)]
        if not wrong:
            use(wheel, Path(scratch) / "environment")
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
