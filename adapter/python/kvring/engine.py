"""Starts and stops engines: the command `kvring serve`, which this package brings along."""

from __future__ import annotations

import importlib.metadata
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import IO

from ._native import EngineError

_READY = "serving"
# The first shell ends at once, so that the engine is nobody's child: vLLM kills all its own children when it ends. The second
# shell prints its process id and becomes the engine, so the id comes before anything that the engine prints.
_ORPHAN = ["/bin/sh", "-c", """/bin/sh -c 'echo $$; exec "$@"' sh "$@" &""", "sh"]
_LOG_BYTES_MAX = 16 << 20


def binary_path() -> str:
    """The path of the command `kvring`: `KVRING_BINARY`, else the one that this package has installed, else the one beside the
    interpreter or in `PATH`."""
    chosen = os.environ.get("KVRING_BINARY")
    if chosen:
        if not os.access(chosen, os.X_OK):
            raise EngineError(f"KVRING_BINARY: expected an executable file, got {chosen}")
        return chosen
    try:
        installed = importlib.metadata.files("kvring") or []
    except importlib.metadata.PackageNotFoundError:
        installed = []
    candidates = [str(file.locate()) for file in installed if file.name == "kvring"]
    candidates.append(os.path.join(os.path.dirname(sys.executable), "kvring"))
    for candidate in candidates:
        if os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return os.path.realpath(candidate)
    found = shutil.which("kvring")
    if found is None:
        raise EngineError("there is no command kvring here: pip install kvring, or set KVRING_BINARY to where it is")
    return found


class Engine:
    """An engine that this process starts: `with Engine("name", "8GiB"): …`.

    `name` and `arena`: as in `kvring serve --name` and `--arena`; a number is bytes. `extra_args`: further arguments of `kvring
    serve`. `start_timeout_s`: how many seconds a start may take.

    `detach`: the engine does not end with this process. It runs in a session of its own, is not bound to this process's CPUs and
    memory nodes, and writes its log to `log_path`.
    """

    def __init__(
        self,
        name: str = "default",
        arena: str | int = "1GiB",
        *,
        extra_args: Sequence[str] = (),
        start_timeout_s: float = 30,
        detach: bool = False,
    ) -> None:
        self.name = name
        self.arena = str(arena)
        self.extra_args = list(extra_args)
        self.start_timeout_s = start_timeout_s
        self.detach = detach
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd: int | None = None
        """The pidfd of an engine that is not our child."""
        self._log: IO[bytes] | None = None
        self._log_from = 0
        self._pid = 0

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Engine({self.name!r}, {self.arena!r}, pid={self.pid})"

    @property
    def pid(self) -> int | None:
        """The engine's process id; `None` while it does not run."""
        return self._pid if self.is_running else None

    @property
    def is_running(self) -> bool:
        """Says whether the engine's process runs."""
        if self._pidfd is not None:
            return not self._wait(0)
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What the engine has written to stderr since its start."""
        if self._log is None:
            return ""
        self._log.seek(self._log_from)
        return self._log.read().decode(errors="replace")

    def start(self) -> Engine:
        """Starts the engine and waits until clients can attach. Raises `EngineError` where it does not start, with what it has
        written to stderr."""
        if self.is_running:
            raise EngineError(f"the kvring engine {self.name} runs already, as process {self.pid}")
        command = [binary_path(), "serve", "--name", self.name, "--arena", self.arena, *self.extra_args]
        if self.detach:
            # The engine serves the whole node: it must not inherit what this process is bound to (one CPU, one memory node).
            command += ["--unbound"]
        elif threading.current_thread() is threading.main_thread():
            # The kernel tells the engine when the thread that started it has ended, however that ended. Only the main thread
            # lives as long as the process.
            command += ["--stop-with-parent", str(os.getpid())]
        # stderr goes to a file: unlike a pipe, it needs no reader and never fills up.
        self._close_log()
        self._log = self._open_log()
        self._forget_orphan()
        try:
            self._process = subprocess.Popen(
                [*_ORPHAN, *command] if self.detach else command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self._log,
                start_new_session=self.detach,
            )
        except OSError as error:
            raise EngineError(f"cannot run {command[0]}: {error}") from error
        self._pid = self._process.pid
        if self.detach:
            self._adopt(self._process)
        self._wait_ready(self._process)
        return self

    def _adopt(self, shell: subprocess.Popen[bytes]) -> None:
        """Opens the engine's process, whose id the shell has printed."""
        assert shell.stdout is not None
        said = shell.stdout.readline().strip()
        shell.wait()
        try:
            self._pid = int(said)
            self._pidfd = os.pidfd_open(self._pid)
        except (ValueError, OSError):
            # The engine has ended already; its log says why.
            self._pidfd = None

    def _forget_orphan(self) -> None:
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None

    def _wait(self, timeout_s: float) -> bool:
        """Has the engine ended, within that time?"""
        if self._pidfd is not None:
            return bool(select.select([self._pidfd], [], [], timeout_s)[0])
        try:
            return self._process is None or self._process.wait(timeout_s) is not None
        except subprocess.TimeoutExpired:
            return False

    def _signal(self, number: int) -> None:
        try:
            if self._pidfd is not None:
                signal.pidfd_send_signal(self._pidfd, number)
            elif self._process is not None:
                self._process.send_signal(number)
        except ProcessLookupError:
            pass

    @property
    def log_path(self) -> str | None:
        """The file to which a detached engine appends its log; `None` for one that is not detached."""
        if not self.detach:
            return None
        return os.path.join(tempfile.gettempdir(), f"kvring-{os.getuid()}-{self.name}.log")

    def _open_log(self) -> IO[bytes]:
        self._log_from = 0
        path = self.log_path
        if path is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                file = os.fdopen(os.open(path, flags, 0o600), "r+b")
            except OSError:
                # The file is another user's: everybody may write to this directory.
                return tempfile.TemporaryFile()
            found = os.fstat(file.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid():
                # The log is appended to: another engine may be running by now, and then ours only says so.
                if found.st_size > _LOG_BYTES_MAX:
                    file.truncate(0)
                self._log_from = file.seek(0, os.SEEK_END)
                return file
            file.close()
        return tempfile.TemporaryFile()

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        # An engine that is not ready in time is killed, and then its stdout ends.
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._signal(signal.SIGKILL)

        timer = threading.Timer(self.start_timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            lines = iter(process.stdout.readline, b"")
            ready = any(line.decode(errors="replace").strip() == _READY for line in lines)
        finally:
            timer.cancel()
            # The engine writes nothing more to stdout.
            process.stdout.close()
        if ready and not late.is_set():
            return
        self._wait(self.start_timeout_s)
        code = None if self.detach else process.returncode
        self._forget_orphan()
        said = self.log.strip() or "it said nothing"
        self._close_log()
        why = (
            f"was not ready within {self.start_timeout_s} s"
            if late.is_set()
            else "has ended"
            if code is None
            else f"ended with code {code}"
        )
        raise EngineError(f"the kvring engine {self.name} {why}:\n{said}")

    def stop(self, timeout_s: float = 30) -> None:
        """Ends the engine by SIGTERM, and by SIGKILL if it still runs after `timeout_s` seconds. Does nothing where none runs."""
        if self.is_running:
            self._signal(signal.SIGTERM)
            # An engine that was stopped by a signal does not get SIGTERM before it goes on.
            self._signal(signal.SIGCONT)
            if not self._wait(timeout_s):
                self.kill()
        self._forget_orphan()
        self._close_log()

    def kill(self) -> None:
        """Ends the engine by SIGKILL, as a crash would: for tests."""
        if self.is_running:
            self._signal(signal.SIGKILL)
            self._wait(self.start_timeout_s)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
