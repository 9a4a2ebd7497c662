"""A peer's pinned requirements → a virtual environment that holds them, made once."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / "build" / "bench-envs"


def peer_environment(name: str) -> Path:
    """A folder with exactly the packages of peers/NAME.txt, made unless it was made from the same file."""
    folder, requirements = ENVIRONMENTS / name, ROOT / "bench" / "peers" / f"{name}.txt"
    made_from = folder / "requirements.txt"
    if made_from.is_file() and made_from.read_text() == requirements.read_text():
        return folder
    print(f"installing {requirements.relative_to(ROOT)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, "-r", str(requirements)], check=True, stdout=sys.stderr)
    shutil.copyfile(requirements, made_from)
    return folder
