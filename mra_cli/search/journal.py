"""What a search has measured so far, on disk: killed at any moment, it goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mra_cli.errors import InputError

T = TypeVar("T")


class Journal:
    """Results by name, JSON types, written after each.

    Args:
        path: The file; None: nothing is kept.
        key: Everything that the results depend on.

    Raises:
        InputError: The file belongs to a search with another key, or is none of ours.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path, self._key = path, json.loads(json.dumps(key))
        self._results: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            before, self._results = data["search"], dict(data["results"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--state {path} must be the state of a search, or not be there; got {error}; "
                "name another file"
            ) from error
        changed = [name for name in self._key if self._key[name] != before.get(name)]
        if changed:
            raise InputError(
                f"--state {path} belongs to a search with another {', '.join(changed)}; delete it, "
                "or name another file"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def get(self, name: str, measure: Callable[[], T]) -> T:
        """The result of that name; measured and written down if it is not there."""
        if name not in self._results:
            self._results[name] = measure()
            self._write()
        return self._results[name]

    def _write(self) -> None:
        if self.path is None:
            return
        text = json.dumps({"search": self._key, "results": self._results}, allow_nan=False)
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            raise InputError(f"can't write --state {self.path}: {error.strerror}") from error
        finally:
            part.unlink(missing_ok=True)
