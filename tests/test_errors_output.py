"""What a failing or interrupted command leaves: files as they were, one line or a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cli_support import Ran, assert_refused, python
from mra_cli import checkpoint
from mra_cli.errors import CheckpointError

# --- output ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "analyze"])
@pytest.mark.parametrize(
    ("target", "says"),
    [("missing/it.json", "no such file or directory"), (".", "directory")],
    ids=["no such directory", "a directory"],
)
def test_output_that_cannot_be_written_is_refused_before_the_work(
    refuses, monkeypatch, tmp_path, command, target, says
):
    def work(*args, **kwargs):
        pytest.fail("loaded a model whose results could not be written")

    monkeypatch.setattr(checkpoint, "load_checkpoint", work)
    path = tmp_path / target
    says = ["--json", "can't write", re.escape(str(path)), says]
    refuses(command, "demo:minilm", "--json", path, code=2, says=says)
    assert not (tmp_path / "missing").exists()


OTHER_ERRORS = {
    "usage": (["--budget", "2"], 2),
    "input": (["--seq-len", "999"], 1),
    "late input": (["--layers", "99"], 1),
    "method": (["--method", "mra8"], 1),
    "model": (["--dtype", "float8"], 1),
}


@pytest.mark.parametrize("kind", OTHER_ERRORS)
def test_stdout_stays_empty_for_whoever_reads_json_there(analyze, kind):
    arguments, code = OTHER_ERRORS[kind]
    analyze(*arguments, "--json", "-", code=code, says=[])


def test_a_file_that_was_there_survives_a_failure(cli, bert, text, tmp_path):
    target = tmp_path / "it.json"
    target.write_text("precious")
    ran = cli("analyze", bert, "--text", text, "--layers", "99", "--json", target)
    assert ran.code == 1
    assert target.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["it.json"]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "says"), [(FULL, "can't write .*No space left"), (KeyboardInterrupt(), "interrupted")]
)
@pytest.mark.parametrize("before", [None, "precious"])
def test_a_write_that_breaks_off_leaves_what_was(
    cli, bert, tmp_path, monkeypatch, before, error, says
):
    def break_off(path, text, **kwargs):
        with path.open("w") as stream:
            stream.write(text[:20])
        raise error

    target = tmp_path / "it.json"
    if before is not None:
        target.write_text(before)
    monkeypatch.setattr(Path, "write_text", break_off)
    ran = cli("check", bert, "--json", target)
    assert ran.code == 1, ran
    assert re.search(says, ran.err)
    assert ran.raw_err.count("\n") == 1
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == ({} if before is None else {"it.json": before})


def test_a_link_is_written_through(cli, bert, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "it.json")
    assert cli("check", bert, "--json", tmp_path / "link").code == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "it.json").read_text())["sites"]


def test_a_pipe_is_written_to_and_not_replaced(cli, bert, tmp_path):
    """Nor is a device: root would lose /dev/null."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert cli("check", bert, "--json", pipe).code == 0
        assert pipe.is_fifo()
        assert json.loads(os.read(reader, 1 << 16))["sites"]
    finally:
        os.close(reader)


# --- interruptions, and errors of our own ----------------------------------------------------


@pytest.mark.parametrize("command", ["check", "analyze"])
def test_interrupted_while_loading(refuses, monkeypatch, command):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "load_checkpoint", interrupted)
    refuses(command, says=["interrupted", "nothing was written"])


def test_ctrl_c_in_the_middle_of_a_measurement(pebble, text, tmp_path):
    """The fifth forward pass is the one in which layers are measured: the signal comes there."""
    folder, mark = tmp_path / "out", tmp_path / "at work"
    folder.mkdir()
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from mra_cli.cli.main import main; main()"
    )
    arguments = ["analyze", pebble, "--trust-remote-code", "--text", text, "--samples", "1"]
    process = subprocess.Popen(
        **python(
            "-c",
            code,
            *arguments,
            *("--seq-len", "128", "--budget", "0.5", "--json", folder / "it.json"),
            PEBBLE_MARK=str(mark),
            PEBBLE_HANG_AT="5",
            HF_MODULES_CACHE=str(tmp_path / "modules"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 50
        while not mark.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert mark.exists(), err
    assert_refused(Ran(process.returncode, out, err), ["interrupted", "nothing was written"])
    assert list(folder.iterdir()) == []


def test_a_traceback_on_demand():
    arguments = ("-m", "mra_cli", "check", "/no/such/directory")
    ran = subprocess.run(
        **python(*arguments, MRA_DEBUG="1"), capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith("Traceback (most recent call last)")
    last = ran.stderr.splitlines()[-1]
    assert "CheckpointError: no such file or directory: /no/such/directory" in last


def test_errors_of_our_own_are_lines_too(cli, monkeypatch):
    """And say that they are ours, and how to see more."""

    def broken(*args, **kwargs):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(checkpoint, "load_checkpoint", broken)
    ran = cli("check")
    assert ran.code == 1
    assert ran.out == ""
    assert re.fullmatch(r"Error: unexpected ZeroDivisionError: division by zero;.*\n", ran.raw_err)
    assert "MRA_DEBUG=1" in ran.err
    assert "report" in ran.err


@pytest.mark.parametrize("error", [CheckpointError("as expected"), ZeroDivisionError("not so")])
def test_debugging_lets_errors_through(cli, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint, "load_checkpoint", broken)
    cli("--version")  # what `cli` sets up comes first
    monkeypatch.setenv("MRA_DEBUG", "1")
    with pytest.raises(type(error)):
        cli("check")


@pytest.mark.parametrize("value", ["", "0"])
def test_debugging_is_off(refuses, monkeypatch, value):
    monkeypatch.setenv("MRA_DEBUG", value)
    refuses("check", "/no/such/directory", says=["no such file or directory"])
