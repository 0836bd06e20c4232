#!/usr/bin/env python3
"""Replaces the CUDA libraries that `import torch` needs by stubs that answer "no device".

    mkstubs.py SITE_PACKAGES

Writes `torch/lib/lib*.so.N`, some 0.3 MB instead of 4 GB. Each exports exactly the symbols that torch's libraries import from
the library it stands for, with the same symbol versions, and returns an error if called. Needs gcc, nm and readelf.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

STUB = re.compile(r"lib(cu[a-zA-Z]*|nccl|nvrtc|nvshmem_host)\.so\.\d+$")
SYSTEM = re.compile(r"^(lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+|gomp)\.so|ld-linux)")
ROOTS = ("torch_global_deps", "c10_cuda", "torch_cpu", "torch_cuda", "torch_nvshmem", "torch_python")

SYMBOLS = {
    "libcudart": r"^(cuda|__cuda)",
    "libcublasLt": r"^cublasLt",
    "libcublas": r"^cublas(?!Lt)",
    "libcudnn": r"^cudnn",
    "libcufft": r"^cufft",
    "libcurand": r"^curand",
    "libcusparseLt": r"^cusparseLt",
    "libcusparse": r"^cusparse(?!Lt)",
    "libnccl": r"^(nccl|pnccl)",
    "libnvrtc": r"^nvrtc",
    "libcupti": r"^cupti",
    "libcufile": r"^cuFile",
    "libnvshmem_host": r"^(nvshmem|_Z.*nvshmem)",
    "libcuda": r"^cu[A-Z]",
}
"""A pattern for the symbols of each library: torch's libraries do not say from which one they want a symbol."""

BODIES = {
    "__cudaRegisterFatBinary": "static void *fat[8]; void **__cudaRegisterFatBinary(void *p) { return fat; }",
    "cudaGetLastError": "int cudaGetLastError(void) { return 0; }",
    "cudaPeekAtLastError": "int cudaPeekAtLastError(void) { return 0; }",
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int *c) { *c = 0; return 100; }",
    "cudaRuntimeGetVersion": "int cudaRuntimeGetVersion(int *c) { *c = 0; return 0; }",
    "cudaDriverGetVersion": "int cudaDriverGetVersion(int *c) { *c = 0; return 0; }",
}


def output(*command: str | Path) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def body(name: str) -> str:
    if name in BODIES:
        return BODIES[name]
    if name.startswith("__cuda"):
        return f"long {name}(void) {{ return 0; }}"
    if "GetErrorString" in name or "GetErrorName" in name:
        return f'const char *{name}(int e) {{ return "no CUDA (stub)"; }}'
    return f"long {name}(void) {{ return 100; }}"  # cudaErrorNoDevice


def survey(libraries: list[Path]) -> tuple[list[str], set[str]]:
    """The libraries that are missing, and the symbols (`name@version`) that are wanted and defined nowhere."""
    have = {library.name for library in libraries}
    defined = {
        line.split()[-1].split("@")[0]
        for library in libraries
        for line in output("nm", "-D", "--defined-only", library)
        if line.split()
    }
    missing: dict[str, None] = {}
    undefined: dict[str, None] = {}
    for root in (library for library in libraries if library.name in {f"lib{name}.so" for name in ROOTS}):
        needed = re.findall(r"NEEDED.*\[(.*?)\]", "\n".join(output("readelf", "-d", root)))
        missing.update((name, None) for name in needed if name not in have and not SYSTEM.match(name))
        for line in output("nm", "-D", "--undefined-only", root):
            parts = line.split()
            if len(parts) >= 2 and parts[-2] == "U" and parts[-1].split("@")[0] not in defined:
                undefined[parts[-1].replace("@@", "@")] = None
    return list(missing), set(undefined)


def build(directory: Path, library: str, symbols: set[str], scratch: Path) -> None:
    looks = re.compile(SYMBOLS[library.split(".so")[0]])
    versions: dict[str, list[str]] = defaultdict(list)
    for symbol in sorted(symbols):
        name, _, version = symbol.partition("@")
        if looks.match(name) or (version and version.startswith(library)):
            versions[version].append(name)
    source, script = scratch / "stub.c", scratch / "stub.map"
    source.write_text("\n".join(body(name) for names in versions.values() for name in names) + "\n")
    options = ["-shared", "-fPIC", "-O0", "-w", f"-Wl,-soname,{library}"]
    if any(versions):
        named = [f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in versions.items() if version]
        script.write_text("".join(named))
        options.append(f"-Wl,--version-script,{script}")
    subprocess.run(["gcc", *options, "-o", directory / library, source], check=True)
    print(f"{library}: {sum(map(len, versions.values()))} symbols, versions {list(versions)}")


def main() -> None:
    directory = Path(sys.argv[1]) / "torch" / "lib"
    shared = [path for path in sorted(directory.iterdir()) if path.is_file() and re.search(r"\.so(\.|$)", path.name)]
    missing, symbols = survey([path for path in shared if not STUB.match(path.name)])
    with tempfile.TemporaryDirectory() as scratch:
        for library in missing:
            build(directory, library, symbols, Path(scratch))


if __name__ == "__main__":
    main()
