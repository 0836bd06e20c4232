"""Runs an example with no engine there, and then with one: `tests/examples.py KVRING CLIENT…`.

KVRING is the command `kvring`, and CLIENT… is the command line of the example, without the engine's name.
"""

import os
import subprocess
import sys


def wrong_without_engine(client: list[str], name: str) -> str | None:
    """The example has to say in one line what is missing and what to do. A traceback or a panic is more than one line."""
    ended = subprocess.run([*client, name], capture_output=True, text=True)
    expected = (f"expected an engine named {name}", f"`kvring serve --name {name}`")
    one_line = ended.stderr.count("\n") == 1 and all(text in ended.stderr for text in expected)
    return None if (ended.returncode, ended.stdout) == (1, "") and one_line else f"without an engine: {ended}"


def wrong_with_engine(kvring: str, client: list[str], name: str) -> str | None:
    serve = [kvring, "serve", "--name", name, "--arena", "16MiB", "--stop-with-parent", str(os.getpid())]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as engine:
        try:
            if "serving\n" not in iter(engine.stdout.readline, ""):
                return f"{serve} does not serve"
            ended = subprocess.run([*client, name], stdout=subprocess.PIPE, text=True)
        finally:
            engine.terminate()
    if ended.returncode != 0 or "loaded 2 chunks" not in ended.stdout:
        return f"with an engine: {ended}"
    return None if engine.returncode == 0 else f"the engine ended with code {engine.returncode}"


def main(kvring: str, *client: str) -> str | None:
    """What is wrong, for `sys.exit`."""
    name = f"example-{os.getpid()}"
    wrong = wrong_without_engine([*client], name) or wrong_with_engine(kvring, [*client], name)
    if not wrong:
        print(f"   {client[-1]}: passed without an engine and with one")
    return wrong


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
