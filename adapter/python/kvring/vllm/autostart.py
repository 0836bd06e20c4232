"""An engine without anybody starting one: the first vLLM that finds none starts it, and it outlives that vLLM."""

from __future__ import annotations

import threading

from kvring import Engine, EngineError, engine_state
from kvring._logs import get_logger

logger = get_logger("vllm.kvring.autostart")

_LOOK_EVERY_S = 0.2
_PAUSE_MAX_S = 30.0


class Keeper:
    """Starts the engine where there is none, now and whenever it has died. Several may try at once: one of them wins, which is
    the engine's own doing (it holds a lock on its name), and the others find it running."""

    def __init__(self, name: str, arena: str):
        self._name = name
        self._arena = arena
        self._closed = threading.Event()
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None

    def ensure(self) -> None:
        """Starts an engine where none runs. Raises `EngineError` where it refuses: what does not fit, and what would help."""
        if not self._is_missing():
            return
        try:
            engine = Engine(self._name, self._arena, detach=True)
            engine.start()
        except EngineError:
            if self._is_missing():
                raise
            # Somebody else was faster.
        else:
            # Kept, to notice when it ends.
            self._engine = engine
            logger.info("started the kvring engine %s (pid %s); its log is %s", self._name, engine.pid, engine.log_path)

    def _is_missing(self) -> bool:
        return engine_state(self._name) in ("absent", "dead")

    def watch(self) -> None:
        """From now on, on a thread of its own."""
        self._thread = threading.Thread(target=self._watch, name="kvring-autostart", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        pause = _LOOK_EVERY_S
        while not self._closed.wait(pause):
            try:
                if self._engine is not None and not self._engine.is_running:
                    self._engine.stop()
                    self._engine = None
                self.ensure()
                pause = _LOOK_EVERY_S
            except Exception as error:
                if pause == _LOOK_EVERY_S:
                    logger.warning("the kvring engine %s is gone and cannot be started: %s; trying again", self._name, error)
                pause = min(pause * 2, _PAUSE_MAX_S)

    def close(self) -> None:
        """Looks no more. The engine lives on. A start that is under way is not waited for."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(0.1)
