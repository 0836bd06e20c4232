"""Imports vLLM once (ten seconds) and forks a child for every `LLM` that a test wants (three seconds).

An `LLM` cannot be made twice in one process, and tests kill them: so each has a process of its own. Requests come over the
socket that is standard input: a line of JSON with the child's environment, and three descriptors: its steps, its answers,
its log. The answer is the child's process id. The zygote itself never computes anything, so it has no threads to lose.
"""

import array
import json
import os
import signal
import socket
import sys


def child(environment: dict[str, str], steps: int, answers: int, log: int) -> None:
    """Becomes a process with one `LLM`; does not return."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for descriptor, place in ((null, 0), (log, 1), (log, 2)):
            os.dup2(descriptor, place)
        os.environ.update(environment)
        from real.serve import serve

        code = serve(os.fdopen(steps), os.fdopen(answers, "w"))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def receive(link: socket.socket) -> tuple[dict, list[int]] | None:
    """The next request and its descriptors; `None` when the tests have ended."""
    descriptors = array.array("i")
    data, ancillary, _, _ = link.recvmsg(65536, socket.CMSG_SPACE(3 * descriptors.itemsize))
    for _, _, content in ancillary:
        descriptors.frombytes(content[: len(content) // descriptors.itemsize * descriptors.itemsize])
    return (json.loads(data), list(descriptors)) if data else None


def main() -> None:
    link = socket.socket(fileno=os.dup(0))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM  # noqa: F401

    while (request := receive(link)) is not None:
        environment, descriptors = request
        pid = os.fork()
        if pid == 0:
            link.close()
            child(environment, *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        link.send(str(pid).encode())


if __name__ == "__main__":
    main()
