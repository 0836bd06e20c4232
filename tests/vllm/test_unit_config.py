"""Wrong options are errors that name the key; right ones mean what the table says."""

from pathlib import Path

import pytest

from kvring import ConfigError
from kvring.vllm.config import Config, table


def test_defaults_need_nothing() -> None:
    config = Config.parse({})
    assert (config.name, config.lookup, config.load, config.chunk_blocks) == ("default", "poll", "async", 1)
    assert config.client["name"] == "default"


def test_values_are_taken() -> None:
    config = Config.parse(
        {
            "kvring.name": "b",
            "kvring.chunk_blocks": 4,
            "kvring.lookup": "poll",
            "kvring.autostart": True,
            "kvring.arena": "32 GiB",
            "kvring.layout": "none",
        }
    )
    assert (config.name, config.chunk_blocks, config.lookup) == ("b", 4, "poll")
    assert config.autostart and config.arena == "32 GiB" and config.layout == "none"


@pytest.mark.parametrize("arena", ["1.5GiB", "8G", "8g", "512 MiB", "2TB", "4096", 4096, " 12 B "])
def test_a_size_is_what_serve_takes(arena: object) -> None:
    assert Config.parse({"kvring.autostart": True, "kvring.arena": arena}).arena == str(arena)


def test_a_name_is_what_serve_takes() -> None:
    assert Config.parse({"kvring.name": "n" * 64}).name == "n" * 64
    with pytest.raises(ConfigError, match=r"kvring\.name: expected an engine name of 1 to 64"):
        Config.parse({"kvring.name": "n" * 65})


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"kvring.nmae": "x"}, "kvring.name?"),
        ({"name": "x"}, "unknown key 'name'; did you mean kvring.name?"),
        ({"lmcache.chunk": 1}, "unknown key 'lmcache.chunk'"),
        ({"kvring.name": "a/b"}, "kvring.name: expected an engine name"),
        ({"kvring.name": 3}, "kvring.name"),
        ({"kvring.chunk_blocks": 0}, "kvring.chunk_blocks: expected a whole number from 1 to 1024, got 0"),
        ({"kvring.chunk_blocks": 1.5}, "got 1.5"),
        ({"kvring.chunk_blocks": True}, "got True"),
        ({"kvring.lookup": "pool"}, 'kvring.lookup: expected "poll" or "async", got \'pool\''),
        ({"kvring.load": "maybe"}, "kvring.load"),
        ({"kvring.checksum": "crc"}, "kvring.checksum"),
        ({"kvring.lookup_timeout_ms": 0}, "kvring.lookup_timeout_ms: expected a number above 0"),
        ({"kvring.lookup_timeout_ms": "5"}, "got '5'"),
        ({"kvring.stall_after_ms": float("inf")}, "kvring.stall_after_ms"),
        ({"kvring.attach_timeout_ms": float("nan")}, "kvring.attach_timeout_ms"),
        ({"kvring.autostart": "yes"}, "kvring.autostart: expected true or false"),
        ({"kvring.autostart": True}, "kvring.arena: expected the size"),
        ({"kvring.arena": "1GiB"}, "kvring.autostart with it"),
        ({"kvring.autostart": True, "kvring.arena": "many"}, "kvring.arena: expected a size"),
        ({"kvring.autostart": True, "kvring.arena": "0"}, "kvring.arena"),
        ({"kvring.autostart": True, "kvring.arena": True}, "kvring.arena: expected a size"),
        ({"kvring.autostart": True, "kvring.arena": "1..5GiB"}, "kvring.arena: expected a size"),
        ({"kvring.layout": "BLHNC"}, 'kvring.layout: expected "auto" or "block-outermost" or "none"'),
    ],
)
def test_a_wrong_option_is_named(extra: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.parse(extra)
    assert named in str(error.value)


def test_what_earlier_releases_had_about_waiting_is_accepted_and_one_line_names_it() -> None:
    assert Config.parse({}).without_effect() is None
    assert Config.parse({"kvring.lookup": "poll", "kvring.poll_interval_us": None}).without_effect() is None
    extra = {
        "kvring.lookup": "async",
        "kvring.lookup_timeout_ms": 2,
        "kvring.pending_timeout_ms": 2,
        "kvring.poll_interval_us": 0,
    }
    line = Config.parse(extra).without_effect()
    assert line is not None and "\n" not in line
    for key in ('kvring.lookup = "async"', *list(extra)[1:]):
        assert line.count(key) == 1, line
    assert "kvring.name" not in line
    line = Config.parse({"kvring.pending_timeout_ms": 2}).without_effect()
    assert line is not None and "kvring.pending_timeout_ms" in line and "kvring.lookup" not in line


def test_the_table_has_every_key() -> None:
    text = table()
    for name in Config.__dataclass_fields__:
        assert f"| `kvring.{name}` |" in text


def test_the_documentation_has_this_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "configuration.md"
    assert table() in page.read_text(), "python -m kvring.vllm.config prints the table"
