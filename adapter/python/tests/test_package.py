"""The package around the adapters: the stub, the engine's process, logs, and the end of the interpreter."""

import ast
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading

import pytest
from conftest import FINGERPRINT, unique_name
from waiting import wait_for

import kvring
from kvring import _native

PACKAGE = pathlib.Path(kvring.__file__).parent


def test_the_stub_says_what_there_is():
    assert (PACKAGE / "py.typed").exists()
    nodes = ast.parse((PACKAGE / "_native.pyi").read_text()).body
    functions = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    constants = {node.target.id for node in nodes if isinstance(node, ast.AnnAssign)}
    said = {*functions, *classes, *constants}
    assert said == {name for name in dir(_native) if not name.startswith("__")}
    for name, node in functions.items():
        assert same(node, getattr(_native, name), 0), name
        assert documented(node, getattr(_native, name)), name
    for name, node in classes.items():
        found = getattr(_native, name)
        assert documented(node, found), name
        members = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        there = {member for member in vars(found) if not member.startswith("_")}
        assert there == {member for member in members if member != "__init__"}, name
        for member, item in members.items():
            assert member == "__init__" or documented(item, vars(found)[member]), (name, member)
            if any(isinstance(decorator, ast.Name) for decorator in item.decorator_list):
                assert inspect.isgetsetdescriptor(vars(found)[member]), (name, member)
            elif member == "__init__":
                assert same(item, found, 1), name
            else:
                assert same(item, vars(found)[member], 0), (name, member)
        if issubclass(found, Exception):
            assert [base.__name__ for base in found.__bases__] == [base.id for base in node.bases]
        else:
            # `final`.
            with pytest.raises(TypeError):
                type("Sub", (found,), {})


def documented(node, found):
    """Is the docstring in the stub the module's? `adapter/python/tests/stub.py` copies those that differ."""
    return ast.get_docstring(node) == inspect.getdoc(found)


def test_help_says_something_of_every_public_name():
    """Reads the sources and the stub, whose docstrings are the built module's by the test above."""
    missing = [name for file in sorted(PACKAGE.rglob("*.py*")) for name in undocumented(file)]
    assert not missing, missing


def is_setter(node):
    """Its property has the docstring."""
    return any(getattr(decorator, "attr", "") == "setter" for decorator in node.decorator_list)


def undocumented(file):
    """The public classes, functions, methods and properties of a file that have no docstring, and the file if it has none."""
    if file.suffix not in (".py", ".pyi"):
        return
    tree = ast.parse(file.read_text())
    inside = [(file.name, tree)]
    while inside:
        name, node = inside.pop()
        if ast.get_docstring(node) is None:
            yield name
        if not isinstance(node, ast.FunctionDef):
            kept = [item for item in node.body if isinstance(item, (ast.ClassDef, ast.FunctionDef)) and not is_setter(item)]
            inside += [(f"{name}: {item.name}", item) for item in kept if not item.name.startswith("_")]


def test_the_options_of_a_client_are_the_same_everywhere():
    """The keyword arguments that the adapters take, their types, and their documentation."""
    defaults = _native.client_defaults()
    assert set(kvring.ClientOptions.__annotations__) == set(defaults)
    doc = kvring.ClientOptions.__doc__
    assert re.findall(r"\* `(\w+)`: ", doc) == [*defaults]
    timeouts = {name: float(default) for name, default in re.findall(r"\* `(\w+_ms)`: [^*]*;\s+(\d+)\.", doc)}
    assert timeouts == {name: default for name, default in defaults.items() if name.endswith("_ms")}
    kvring.WorkerAdapter(FINGERPRINT, world=1, rank=0, chunk_tokens=16, **defaults).shutdown()
    adapter = kvring.PollingSchedulerAdapter
    adapter(FINGERPRINT, **defaults).shutdown()
    with pytest.raises(TypeError, match=r"expected the options of kvring\.ClientOptions, got 'stall_after_s'"):
        adapter(FINGERPRINT, stall_after_s=1)
    with pytest.raises(TypeError, match="argument 'stall_after_ms': "):
        adapter(FINGERPRINT, stall_after_ms="1")
    with pytest.raises(kvring.ConfigError, match="flush_timeout_ms: expected a number from 0 on, got -1"):
        adapter(FINGERPRINT, flush_timeout_ms=-1)


def same(node, found, skipped):
    """Names, kinds and defaults of the parameters."""
    arguments = node.args
    plain = arguments.args[skipped:]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    said = [(argument.arg, "POSITIONAL_OR_KEYWORD", default) for argument, default in zip(plain, defaults)]
    said += [(argument.arg, "KEYWORD_ONLY", default) for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults)]
    said += [(argument.arg, "VAR_KEYWORD", None) for argument in [arguments.kwarg] if argument]
    there = inspect.signature(found).parameters.values()
    names = [(name, kind) for name, kind, _ in said]
    # `self` of a built-in method is positional only, which no stub says.
    if names != [
        (parameter.name, parameter.kind.name.replace("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")) for parameter in there
    ]:
        return False
    for (_, _, default), parameter in zip(said, there):
        required = parameter.default is parameter.empty
        if required != (default is None):
            return False
        # PyO3 writes some defaults as `...`.
        if not required and parameter.default is not ... and ast.literal_eval(default) != parameter.default:
            return False
    return True


def test_the_package_has_the_names_that_it_lists_and_its_command():
    assert set(kvring.__all__) <= set(dir(kvring))
    assert kvring.KvringError.__module__ == "kvring"
    assert "Usage" in subprocess.check_output([kvring.binary_path(), "--help"], text=True)


def test_vllm_is_told_of_its_plugin():
    (plugin,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="kvring")
    assert plugin.value == "kvring.plugin:register" and importlib.util.find_spec(plugin.module) is not None


@pytest.mark.parametrize(
    ("option", "value", "parse"),
    [("--arena", "1..5GiB", kvring.byte_size), ("--arena", "8 G iB", kvring.byte_size), ("--name", "n" * 65, kvring.engine_name)],
)
def test_what_serve_refuses_python_refuses_in_the_same_words(option, value, parse):
    with pytest.raises(kvring.ConfigError) as ours:
        parse(value)
    served = subprocess.run([kvring.binary_path(), "serve", option, value], capture_output=True, text=True)
    assert served.returncode != 0 and str(ours.value) in served.stderr


def test_what_serve_takes_python_takes():
    assert (kvring.byte_size("1.5GiB"), kvring.byte_size("8G"), kvring.byte_size("4096")) == (3 << 29, 8 << 30, 4096)
    assert kvring.engine_name("n" * 64) == "n" * 64


def test_an_engine_starts_and_stops_and_says_why_not():
    engine = kvring.Engine(unique_name(), "16MiB")
    assert (engine.pid, engine.is_running) == (None, False)
    engine.stop()
    with engine:
        assert engine.is_running and kvring.engine_state(engine.name) == "serving"
        pid = engine.pid
        with pytest.raises(kvring.EngineError, match=f"runs already, as process {pid}"):
            engine.start()
        with pytest.raises(kvring.EngineError, match=engine.name):
            kvring.Engine(engine.name, "16MiB", extra_args=["--start-wait-ms", "1"]).start()
    assert not engine.is_running and kvring.engine_state(engine.name) == "absent"
    with pytest.raises(kvring.EngineError, match="ended with code"):
        kvring.Engine(unique_name(), "nonsense").start()
    with pytest.raises(kvring.EngineError, match=r"was not ready within 0\.0"):
        kvring.Engine(unique_name(), "64MiB", start_timeout_s=0.0).start()


def test_a_detached_engine_outlives_the_process_that_started_it():
    name = unique_name()
    # vLLM ends by killing all that descend from it: an engine must not.
    script = (
        "import kvring, os, sys; pid = kvring.Engine(sys.argv[1], '16MiB', detach=True).start().pid;"
        "print(pid, os.getpid(), open(f'/proc/{pid}/stat').read().rsplit(')', 1)[1].split()[1])"
    )
    said = subprocess.check_output([sys.executable, "-c", script, name])
    pid, starter, parent = map(int, said.split())
    assert parent != starter
    assert kvring.engine_state(name) == "serving"
    assert os.getsid(pid) != os.getsid(0)
    os.kill(pid, 15)
    wait_for(lambda: kvring.engine_state(name) == "absent", "the engine has ended")


def test_a_detached_engine_is_watched_stopped_and_says_why_not():
    name = unique_name()
    engine = kvring.Engine(name, "16MiB", detach=True).start()
    try:
        assert engine.is_running and engine.pid
        with pytest.raises(kvring.EngineError, match="runs already"):
            kvring.Engine(name, "16MiB", detach=True).start()
        os.kill(engine.pid, 9)
        wait_for(lambda: not engine.is_running, "the engine is dead")
        assert engine.pid is None and kvring.engine_state(name) == "dead"
        engine.start()
        engine.stop()
        assert not engine.is_running and kvring.engine_state(name) == "absent"
    finally:
        os.unlink(engine.log_path)


def test_the_binary_is_found(monkeypatch, tmp_path):
    installed = kvring.binary_path()
    assert os.access(installed, os.X_OK)
    monkeypatch.setenv("KVRING_BINARY", str(tmp_path / "none"))
    with pytest.raises(kvring.EngineError, match="KVRING_BINARY"):
        kvring.binary_path()
    (tmp_path / "kvring").symlink_to(installed)
    monkeypatch.setenv("KVRING_BINARY", str(tmp_path / "kvring"))
    assert kvring.binary_path() == str(tmp_path / "kvring")
    monkeypatch.delenv("KVRING_BINARY")
    monkeypatch.setattr("importlib.metadata.files", lambda name: [])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert os.path.realpath(kvring.binary_path()) == installed
    monkeypatch.setenv("PATH", "")
    with pytest.raises(kvring.EngineError, match="pip install kvring"):
        kvring.binary_path()


class Collect(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []
        self.news = threading.Condition()

    def emit(self, record):
        with self.news:
            self.records.append(record)
            self.news.notify_all()

    def wait(self, wanted):
        with self.news:
            assert self.news.wait_for(lambda: any(wanted(record) for record in self.records)), self.records


def test_what_the_adapters_say_goes_to_logging(engine):
    collect = Collect()
    logger = logging.getLogger("kvring")
    logger.addHandler(collect)
    logger.setLevel(logging.DEBUG)
    try:
        scheduler = kvring.PollingSchedulerAdapter(FINGERPRINT, name=engine.name)
        collect.wait(
            lambda record: (
                record.name.startswith("kvring.adapter.")
                and record.levelno == logging.INFO
                and record.getMessage().startswith("kvring: connected to the kvring engine engine=" + engine.name)
            )
        )
        assert not [record for record in collect.records if record.levelno == logging.DEBUG]
        kvring.set_log_level(logging.DEBUG)
        scheduler.shutdown()
        collect.wait(lambda record: record.levelno == logging.DEBUG and "shut down" in record.getMessage())
    finally:
        kvring.set_log_level(logging.INFO)
        logger.removeHandler(collect)


EXITS = {
    "by itself": "",
    "with an exception": "raise SystemExit(0)",
    "with a dead engine": "engine.kill()",
    "with a stopped engine": "import os, signal; os.kill(engine.pid, signal.SIGSTOP)",
    "with a thread that waits": (
        "import threading; worker.submit_store('r', (1, 1), [bytes(16)], [0])\n"
        "threading.Thread(target=worker.wait_idle, args=(50,)).start()\n"
        "threading.Thread(target=worker.wait_job, args=(77, 1e9), daemon=True).start()"
    ),
    "with a daemon that waits for ever": (
        "import os, signal, threading; os.kill(engine.pid, signal.SIGSTOP)\n"
        "worker.submit_store('r', (1, 1), [bytes(16)], [0])\n"
        "threading.Thread(target=worker.wait_idle, args=(1e9,), daemon=True).start()"
    ),
    "with a forked child": "import os; pid = os.fork()\nif pid: os.waitpid(pid, 0)",
    "without its adapters": "del worker, scheduler",
    "twice shut down": "worker.shutdown(); scheduler.shutdown(); worker.shutdown()",
}


@pytest.mark.parametrize("how", EXITS)
def test_the_interpreter_ends(how):
    name = unique_name()
    script = f"""
import atexit, ctypes, logging, sys, kvring
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
engine = kvring.Engine({name!r}, "16MiB", extra_args=["--slab", "1MiB"]).start()
atexit.register(engine.kill)
memory = ctypes.create_string_buffer(1 << 16)
options = dict(name={name!r}, operation_timeout_ms=200, drain_timeout_ms=200)
worker = kvring.WorkerAdapter(bytes(32), world=1, rank=0, chunk_tokens=1, **options)
group = kvring.KvGroup(16, 1, [(ctypes.addressof(memory), (16, 4096), (4096, 1), 1)])
worker.register_kv_caches([group], owner=memory)
scheduler = kvring.PollingSchedulerAdapter(bytes(32), **options)
scheduler.lookup("r", 0, [bytes(16)])
{EXITS[how]}
"""
    ended = subprocess.run([sys.executable, "-X", "faulthandler", "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    # Lines from before the end are not lost. (Only an adapter that was shut down has surely written its own.)
    assert "kvring: connected to the kvring engine" in ended.stdout or how != "twice shut down"


def test_waiting_for_lines_of_the_log_ends_when_they_are_closed():
    script = """
from kvring import _native
assert _native.next_logs(1) == []
_native.close_logs()
assert _native.next_logs(1e9) == []
"""
    subprocess.run([sys.executable, "-c", script], check=True)
