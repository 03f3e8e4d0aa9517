"""API keys: generated, stored as hashes, checked, counted, and reloaded when their file changes."""

import asyncio
import base64
import hmac
import json
import re
import runpy
import stat
import sys
from contextlib import AsyncExitStack

import pytest
import yaml

from serve.errors import AuthenticationError, OverloadedError
from serve.keys import PREFIX, KeyRing, add_key, hash_key, main, new_key
from skipvision.errors import ConfigError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.yaml"


def test_a_key_is_a_prefix_and_256_random_bits():
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert key.startswith(PREFIX)
        assert len(base64.urlsafe_b64decode(key.removeprefix(PREFIX) + "=")) == 32


def test_a_hash_is_sha256():
    assert hash_key("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_key_identifies_its_owner(file):
    keys = {name: add_key(file, name) for name in ("alice", "bob")}
    ring = KeyRing(file)
    for name, key in keys.items():
        assert ring.authenticate(key).name == name


@pytest.mark.parametrize(
    "change", [str.upper, lambda key: key + "x", lambda key: key[:-1], hash_key, lambda _: "é\ud800"]
)
def test_unknown_keys_are_refused_and_not_quoted(file, change):
    wrong = change(add_key(file, "alice"))
    with pytest.raises(AuthenticationError, match="is unknown") as caught:
        KeyRing(file).authenticate(wrong)
    assert wrong not in str(caught.value)
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("key", [None, ""])
def test_a_request_without_a_key_is_refused(file, key):
    add_key(file, "alice")
    with pytest.raises(AuthenticationError, match="no API key was given"):
        KeyRing(file).authenticate(key)


def test_every_entry_is_compared_in_constant_time(file, monkeypatch):
    def compare(*arguments):
        compared.append(arguments)
        return real(*arguments)

    real = hmac.compare_digest
    keys = [add_key(file, name) for name in "abc"]
    ring = KeyRing(file)
    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in keys:
        compared = []
        ring.authenticate(key)
        assert len(compared) == 3


def test_without_a_file_everyone_is_admitted():
    async def run():
        async with KeyRing(None).admitted(None, 1) as entry:
            return entry

    assert asyncio.run(run()) is None


# ---------------------------------------------------------------------------------------- concurrency


def test_a_key_has_no_more_requests_running_than_its_limit(file):
    limited, free = add_key(file, "limited", max_concurrent=2), add_key(file, "free")
    ring = KeyRing(file)

    async def run():
        async with AsyncExitStack() as stack:
            for key in (limited, limited, free, free, free):
                await stack.enter_async_context(ring.admitted(key, 7))
            with pytest.raises(
                OverloadedError, match="'limited' has 2 requests running; its limit is 2"
            ) as caught:
                async with ring.admitted(limited, 7):
                    pass
            assert caught.value.retry_after == 7
        async with ring.admitted(limited, 7) as entry:  # the earlier ones have ended
            return entry.name

    assert asyncio.run(run()) == "limited"


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
def test_a_failed_or_cancelled_request_frees_its_slot(file, error):
    key = add_key(file, "one", max_concurrent=1)
    ring = KeyRing(file)

    async def run():
        for _ in range(2):
            with pytest.raises(error):
                async with ring.admitted(key, 7):
                    raise error

    asyncio.run(run())


# ------------------------------------------------------------------------------------------- the file


def test_keys_are_added_changed_and_revoked_without_a_restart(file):
    alice = add_key(file, "alice")
    ring = KeyRing(file)
    bob = add_key(file, "bob")
    assert ring.authenticate(bob).name == "bob"
    entries = yaml.safe_load(file.read_text())["keys"]
    file.write_text(json.dumps({"keys": [{**entries[1], "max_concurrent": 3}]}))  # JSON works too
    assert ring.authenticate(bob).max_concurrent == 3
    with pytest.raises(AuthenticationError):
        ring.authenticate(alice)
    file.write_text("keys: []")
    with pytest.raises(AuthenticationError):
        ring.authenticate(bob)


def test_a_file_that_becomes_unreadable_locks_nobody_out(file, caplog):
    alice = add_key(file, "alice")
    ring = KeyRing(file)
    for break_it in (lambda: file.write_text("keys: ["), lambda: file.write_text(""), file.unlink):
        break_it()
        caplog.clear()
        for _ in range(2):
            assert ring.authenticate(alice).name == "alice"
        assert [record.message.partition(":")[0] for record in caplog.records] == [
            "the API keys stay unchanged"
        ]
    bob = add_key(file, "bob")
    assert ring.authenticate(bob).name == "bob"


ENTRY = {"name": "a", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read on .*: No such file"),
        ("", "is invalid: should be a valid dict"),
        ("keys: [", "neither YAML nor JSON"),
        (b"\xff\xfe\xff", "neither YAML nor JSON"),
        ("key: []", "is invalid: keys: is required"),
        (json.dumps({"keys": [{"name": "a", "sha256": "sk-skip-secret"}]}), r"keys\.0\.sha256"),
        (json.dumps({"keys": [{**ENTRY, "key": "sk-skip-secret"}]}), r"keys\.0\.key"),
        (json.dumps({"keys": [{**ENTRY, "max_concurrent": 0}]}), r"keys\.0\.max_concurrent"),
        (json.dumps({"keys": [ENTRY, ENTRY]}), "2 keys have the name a"),
        (json.dumps({"keys": [ENTRY, {**ENTRY, "name": "b"}]}), "2 keys have the sha256"),
    ],
)
def test_errors_in_the_file_are_reported_without_quoting_it(file, text, message):
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        KeyRing(file)
    assert "secret" not in str(caught.value)


# --------------------------------------------------------------------------------------- command line


@pytest.mark.filterwarnings("ignore:'serve.keys' found in sys.modules")
def test_the_command_prints_the_key_once_and_stores_its_hash(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keys", "new", "alice", "--file", str(file), "--max-concurrent", "4"])
    runpy.run_module("serve.keys", run_name="__main__")  # as `python -m serve.keys` does
    printed = capsys.readouterr()
    assert re.fullmatch(rf"{PREFIX}[\w-]{{43}}\n", printed.out)
    key = printed.out.strip()
    assert key not in file.read_text() + printed.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert KeyRing(file).authenticate(key).max_concurrent == 4
    assert list(file.parent.iterdir()) == [file]


def test_the_file_becomes_private_and_a_symbolic_link_stays(tmp_path):
    real, link = tmp_path / "real.yaml", tmp_path / "link.yaml"
    real.write_text("keys: []")
    real.chmod(0o644)
    link.symlink_to(real)
    key = add_key(link, "alice")
    assert link.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert KeyRing(real).authenticate(key).name == "alice"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("alice", [], "has a key named 'alice'"),
        ("", [], "name="),
        ("bob", ["--max-concurrent", "0"], "max_concurrent=0"),
    ],
)
def test_the_command_leaves_the_file_alone_when_it_refuses(file, name, options, message):
    add_key(file, "alice")
    before = file.read_text()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(["new", name, "--file", str(file), *options])
    assert file.read_text() == before


def test_the_command_reports_when_it_cannot_write(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: "):
        main(["new", "alice", "--file", str(tmp_path / "none" / "keys.yaml")])
