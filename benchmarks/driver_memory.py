"""How much memory a job's driver takes for a family, and how long a corpus takes to open, as
captions grow.

    python -m benchmarks.driver_memory --quick

The driver plans a family, finishes it and reads its records, in a process of its own that has
loaded nothing else; what is shown is the growth of its peak. The peer is the same with fewer
captions. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import torch

from benchmarks.store import UNIT, make_corpus, open_writer
from lidit.store import Corpus, publish_corpus, shared_table, text_table
from lidit.store.files.folder import Folder


def driver(corpus: str) -> None:
    """What a job's driver does around its actors; prints the growth of its peak memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    writer = open_writer(Path(corpus), "bfloat16")
    assert writer.pending() == []
    writer.finish()
    Corpus.open(corpus).text_family("bfloat16").record(0)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def driver_memory(work: Path, counts: list[int]) -> dict[str, float]:
    found = {}
    for count in counts:
        corpus = work / f"driver-{count}"
        sizes = [min(UNIT, count - first) for first in range(0, count, UNIT)]
        make_corpus(corpus, sizes)
        writer = open_writer(corpus, "bfloat16")
        one = torch.zeros(1, 8)
        writer.write_shared(shared_table([0], one, [0], one, torch.zeros(8), torch.ones(8)))
        for unit, size in enumerate(sizes):
            states = [torch.full((3, 8), 1.0, dtype=torch.bfloat16)] * size
            writer.publish(unit, text_table([[1, 2, 3]] * size, states, "bfloat16"))
        command = [sys.executable, "-m", "benchmarks.driver_memory", "--driver", str(corpus)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[str(count)] = round(float(output.split()[-1]), 1)
        print(
            f"  driver memory, {count:,} captions in {len(sizes)} units: +{found[str(count)]} MiB",
            flush=True,
        )
    return found


def open_large(work: Path, units: int = 250_000) -> float:
    """Seconds to open a corpus with the unit table of a billion samples and look at
    its last row.
    """
    row = {
        "source": "shard.tar",
        "samples": 4096,
        "captions": 4096,
        "samples_bytes": 1,
        "captions_bytes": 1,
    }
    hashes = {"samples_sha256": "0" * 64, "captions_sha256": "0" * 64}
    rows = [{**row, **hashes, "unit": unit} for unit in range(units)]
    publish_corpus(Folder.at(work / "large"), rows, 6, "/", pa.table({"file": ["x"]}), {}, {})
    started = time.perf_counter()
    Corpus.open(work / "large").units.slice(units - 1).to_pylist()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="100 thousand captions at most, not a million"
    )
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        driver(arguments.driver)
        return
    counts = [10_000, 100_000] if arguments.quick else [10_000, 100_000, 1_000_000]
    with tempfile.TemporaryDirectory(prefix="driver-memory-") as name:
        memory = driver_memory(Path(name), counts)
        seconds = round(open_large(Path(name)), 2)
    print(f"  corpus of 250,000 units opens in {seconds} s")
    largest = memory[str(counts[-1])]
    result = {"benchmark": "driver_memory", "quick": arguments.quick, "cores": os.cpu_count(),
              "driver_memory_mib": memory,
              "ratio_largest_over_smallest": round(largest / memory[str(counts[0])], 2),
              "open_250k_units_seconds": seconds}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
