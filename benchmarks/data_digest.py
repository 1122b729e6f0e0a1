"""What it costs a rank to show its data: an image folder of many files, listed and digested.

    python benchmarks/data_digest.py FOLDER [FILES]

Makes FOLDER with so many tiny files (200,000) in 1,000 classes where it is not there.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from largebatch.data import ImageFolder, digest
from largebatch.data.workers import LoaderConfig


def make(folder: Path, num_files: int, num_classes: int) -> None:
    """Write the files; they are no photographs, which nobody asks them to be."""
    for half, num in (("train", num_files), ("val", num_classes)):
        for label in range(num_classes):
            place = folder / half / f"n{label:08d}"
            place.mkdir(parents=True)
            for number in range(num // num_classes):
                (place / f"n{label:08d}_{number:06d}.JPEG").write_bytes(b"x" * 200)


def main(folder: Path, num_files: int) -> None:
    """Print seconds, and seconds scaled to a million files."""
    if not folder.exists():
        make(folder, num_files, 1000)
    for attempt in ("first", "again"):
        started = time.perf_counter()
        source = ImageFolder(path=str(folder)).load(0)
        loaded = time.perf_counter()
        digest(source, LoaderConfig())
        seconds = time.perf_counter() - loaded
        scale = 1e6 / len(source.train)
        print(
            f"{attempt}: {len(source.train):,} files: listed in {loaded - started:.2f} s, digested in {seconds:.3f} s "
            f"(a million: {scale * (loaded - started):.1f} s and at most {scale * seconds:.2f} s)"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 200_000)
