"""Files → the hash and the name that identify them; hashes are remembered between runs.

A checkpoint's shards are gigabytes that hardly ever change, and every run has to know whether they did.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from mistral_trt.artifact import cache_folder, write_file
from mistral_trt.manifest import sha256_file

_REMEMBER_BYTES = 1 << 26


def files_sha256(paths: Iterable[Path]) -> str:
    """The hash over name and SHA-256 of every file, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(set(paths), key=lambda path: path.name):
        digest.update(f"{path.name} {remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a file; for large files it is kept, keyed by path, size, inode and time of change."""
    real = path.resolve()
    stat = real.stat()
    if stat.st_size < _REMEMBER_BYTES:
        return sha256_file(real)
    store = cache_folder() / "sha256.json"
    key = f"{real} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns}"
    try:
        known = json.loads(store.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict) or not isinstance(known.get(key), str):
        known = {**(known if isinstance(known, dict) else {}), key: sha256_file(real)}
        with suppress(OSError):  # a cache folder that cannot be written costs time, nothing else
            store.parent.mkdir(parents=True, exist_ok=True)
            write_file(store, json.dumps(known, indent=1).encode())
    return str(known[key])


def clean_name(stem: str) -> str:
    """A folder's name with nothing in it that a path or a shell could trip over."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "model"
