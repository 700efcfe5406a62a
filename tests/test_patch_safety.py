"""Patching is all or nothing: the directory is absent or complete, and the source never touched."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_support import python
from mra_cli import export, staging
from mra_cli.errors import ExportError
from mra_cli.methods import make_method
from mra_cli.prepare import prepare
from mra_cli.staging import sha256

QUICK = ("--no-measure", "--budget", "0.5")


def hashes(path: Path) -> dict[str, str]:
    return {str(p.relative_to(path)): sha256(p) for p in path.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_killed_at_any_moment_the_directory_is_absent_or_complete(bert, tmp_path, kills=100):
    """Half the time an older checkpoint is there, which must then be there whole, or replaced."""
    script = Path(__file__).with_name("kill_patch.py")
    call = python(script, bert, tmp_path, kills)
    done = subprocess.run(**call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    assert seen["absent"] + seen["old"] + seen["new"] == kills
    assert min(seen.values()) > 0, "the kills did not hit what they should"


def test_weights_are_linked_and_the_source_keeps_its_own(cli, copy, tmp_path):
    source, out = copy(), tmp_path / "out"
    before = hashes(source)
    assert cli("patch", source, "--out", out, *QUICK).code == 0
    assert (out / "model.safetensors").stat().st_ino == (source / "model.safetensors").stat().st_ino
    # Saving into the patched directory makes a new file there, and leaves the source alone.
    import transformers

    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    with torch.no_grad():
        next(model.parameters()).zero_()
    model.save_pretrained(out)
    shutil.rmtree(out)
    assert hashes(source) == before


def test_copies_are_copies(cli, copy, tmp_path):
    source, out = copy(), tmp_path / "out"
    assert cli("patch", source, "--out", out, "--copy", *QUICK).code == 0
    one, other = (path / "model.safetensors" for path in (source, out))
    assert one.stat().st_ino != other.stat().st_ino and sha256(one) == sha256(other)


def test_links_of_a_hub_cache_are_followed(cli, copy, tmp_path):
    """There, files are symbolic links to blobs."""
    source, blobs, out = copy(), tmp_path / "blobs", tmp_path / "out"
    blobs.mkdir()
    for file in list(source.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert cli("patch", source, "--out", out, *QUICK).code == 0
    weights = out / "model.safetensors"
    assert not weights.is_symlink()
    assert weights.stat().st_ino == (blobs / "model.safetensors").stat().st_ino


def test_another_file_system_gets_copies(cli, copy, tmp_path, monkeypatch):
    def crossing(*args, **kwargs):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    source, out = copy(), tmp_path / "out"
    monkeypatch.setattr(staging.os, "link", crossing)
    ran = cli("patch", source, "--out", out, "--link", *QUICK)
    assert ran.code == 1 and "pass --copy" in ran.err and not out.exists(), ran
    assert cli("patch", source, "--out", out, *QUICK).code == 0
    assert sha256(out / "model.safetensors") == sha256(source / "model.safetensors")


def limited(limit: int):
    """Runs before a child's Python: no file may grow beyond ``limit`` bytes."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@pytest.mark.parametrize("there", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_leaves_nothing_and_what_was_there(cli, copy, tmp_path, there):
    source, out = copy(), tmp_path / "out"
    if there:
        assert cli("patch", source, "--out", out, "--copy", *QUICK).code == 0
    before = hashes(source), hashes(out)
    arguments = ("-m", "mra_cli", "patch", source, "--out", out, "--copy", "--force", *QUICK)
    call = python(*arguments)
    done = subprocess.run(
        **call, capture_output=True, text=True, check=False, preexec_fn=limited(100_000)
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: can't write") and done.stderr.count("\n") == 1
    assert "File too large" in done.stderr and "nothing that was there has changed" in done.stderr
    assert (hashes(source), hashes(out)) == before
    assert out.exists() is there
    assert {p.name for p in tmp_path.iterdir()} <= {source.name, "out"}


def test_no_space_says_so(cli, copy, tmp_path, monkeypatch):
    source, out = copy(), tmp_path / "out"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "place", full)
    ran = cli("patch", source, "--out", out, *QUICK)
    assert ran.code == 1 and "No space left on device" in ran.err, ran
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_source_that_changes_meanwhile_is_noticed(cli, copy, tmp_path, monkeypatch):
    source, out = copy(), tmp_path / "out"
    real = export.place

    def place(file, *args):
        result = real(file, *args)
        if file.name == "model.safetensors":
            weights = load_file(file)
            save_file(weights, file, metadata={"format": "pt", "changed": "yes"})
        return result

    monkeypatch.setattr(export, "place", place)
    ran = cli("patch", source, "--out", out, *QUICK)
    assert ran.code == 1 and "must not change while it is patched" in ran.err, ran
    assert not out.exists() and [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_copy_that_reads_otherwise_is_noticed(copy, tmp_path, monkeypatch):
    source = copy() / "model.safetensors"
    monkeypatch.setattr(staging, "sha256", lambda path: "0" * 64)
    with pytest.raises(ExportError, match="reads otherwise than it was written"):
        staging.place(source, tmp_path / "x", "copy")


def test_two_at_once_do_not_meet(tmp_path):
    with (
        staging.staged(tmp_path / "out", force=False) as part,
        pytest.raises(ExportError, match="another process is writing"),
        staging.staged(tmp_path / "out", force=False),
    ):
        pass
    assert part.name == ".out.part" and (tmp_path / "out").is_dir()


def test_replacing_works_where_directories_cannot_be_swapped(cli, bert, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(staging.sys, "platform", "darwin")
    for _ in range(2):
        assert cli("patch", bert, "--out", out, "--force", *QUICK).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_pickles_and_code_stay_behind(cli, copy, tmp_path):
    source, out = copy(), tmp_path / "out"
    for name in ("pytorch_model.bin", "evil.py", "model.onnx", ".hidden", "tf_model.h5"):
        (source / name).write_bytes(b"\x80\x04boom")
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"x")
    ran = cli("patch", source, "--out", out, *QUICK)
    assert ran.code == 0, ran
    assert "left out" in ran.out and "evil.py" in ran.out
    names = {p.name for p in out.rglob("*")}
    assert not names & {"pytorch_model.bin", "evil.py", "model.onnx", ".hidden", "tf_model.h5"}


HOSTILE = '"; import os; os.system("touch pwned"); """'


def test_hostile_names_and_configs_stay_data(cli, copy, tmp_path, monkeypatch):
    """A model's name and config can say what they like: they are written as JSON and as text."""
    source = copy().rename(tmp_path / (HOSTILE.replace("/", "") + "`<script>"))
    config = json.loads((source / "config.json").read_text())
    config |= {
        "_name_or_path": HOSTILE,
        "note": HOSTILE,
        "auto_map": {"AutoModel": "evil.Evil", HOSTILE: HOSTILE},
        "_attn_implementation": "eager",
        "attn_implementation": "eager",
    }
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    ran = cli("patch", source, "--out", out, *QUICK)
    assert ran.code == 0, ran
    for file in out.glob("*.py"):
        assert "pwned" not in file.read_text()
    card = (out / "README.md").read_text()
    assert "<script>" not in card and "import os" in card, "named, as text"
    written = json.loads((out / "config.json").read_text())
    assert set(written["auto_map"].values()) <= {
        f"modeling_mra.{name}" for name in dir(__import__("transformers"))
    }
    assert not any("attn_implementation" in key for key in written)
    assert not (tmp_path / "pwned").exists()


def test_an_entry_can_name_no_implementation_but_ours(bert, tmp_path):
    """A config that says "sdpa" must not have us registered in the place of torch's own."""
    import transformers

    prepared = prepare(str(bert), method=make_method("mra", 0.5))
    out = export.export(prepared, tmp_path / "out", None).path
    config = json.loads((out / "config.json").read_text())
    for entry in ({**config["mra"], "implementation": "sdpa"}, {"plan": 1}, "mra", 7):
        (out / "config.json").write_text(json.dumps({**config, "mra": entry}))
        with pytest.raises(Exception, match="must hold 'implementation' and 'plan'"):
            transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
