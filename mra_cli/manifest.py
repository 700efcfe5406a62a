"""What a patched checkpoint says of itself: its source, versions, figures, and files by hash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from mra_cli import __version__
from mra_cli.errors import CheckpointError
from mra_cli.figures import Figures
from mra_cli.prepare import Prepared
from mra_cli.runtime import implementation_name
from mra_cli.staging import MARK, sha256

SCHEMA = 1

HASHED_BYTES = 256 << 20
"""Linked weights up to this size are hashed for the manifest; reading more would take longer than
all else. Copies always are."""


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a patched checkpoint.

    Raises:
        CheckpointError: There is none, or it can't be read.
    """
    try:
        manifest = json.loads((path / MARK).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(
                f"{path / MARK} must have schema {SCHEMA}, got {manifest['schema']}; update mra-cli"
            )
        names, _ = manifest["files"].keys(), manifest["figures"]
        outside = [name for name in names if Path(name).is_absolute() or ".." in name]
        if outside:
            raise ValueError(f"files outside the directory, {outside[0]}")
        return dict(manifest)
    except OSError as error:
        raise CheckpointError(
            f"DIR must be a patched checkpoint, and {path} has no {MARK}; make one with: "
            "mra-cli patch MODEL --out DIR"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MARK} is damaged ({error}); patch again") from error


def write_manifest(
    part: Path,
    prepared: Prepared,
    figures: Figures | None,
    digests: dict[str, str],
    linked: set[str],
) -> None:
    """Write the manifest of the files of ``part``, to be called last.

    Args:
        figures: None: not measured.
        digests: SHA-256 by name, of files that are hashed already.
        linked: Names of files that share the source's bytes on disk.
    """
    files = {}
    for path in sorted(p for p in part.rglob("*") if p.is_file()):
        name, size = path.relative_to(part).as_posix(), path.stat().st_size
        big = name in linked and size > HASHED_BYTES
        digest = None if big else digests.get(name) or sha256(path)
        files[name] = {"bytes": size, "sha256": digest}
    manifest = {
        "schema": SCHEMA,
        "source": {
            "name": prepared.public_name,
            "fingerprint": prepared.checkpoint.fingerprint,
            "class": type(prepared.checkpoint.model).__name__,
        },
        "versions": {
            "mra_cli": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "implementation": implementation_name(),
        "figures": None if figures is None else figures.to_dict(),
        "files": files,
    }
    (part / MARK).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
