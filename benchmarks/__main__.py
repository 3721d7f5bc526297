"""`make bench` and `make bench-full`: runs the suites, prints one table and writes results/<machine>-<version>.json.

    python -m benchmarks [--full] [-k EXPRESSION] [--device cpu|cuda] [--out FOLDER]

The short set is, in one dtype, a shape of each op, training of two blocks, and a network's training and inference.
Exit status: pytest's.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import machine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every shape and dtype: hours on a CPU")
    parser.add_argument("-k", default="", metavar="EXPRESSION", help="which tests, as pytest takes it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument(
        "--out", type=Path, default=machine.RESULTS, help="folder of the results (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "benchmarks: error: --device cuda, but there is no GPU here\n")
    os.environ["RESNET_FUSED_BENCH_DEVICE"] = device
    args.out.mkdir(parents=True, exist_ok=True)
    path = machine.result_path(device, args.out)
    partial = path.with_suffix(".partial")  # pytest-benchmark opens it before the first test
    chosen = ["-k", args.k] if args.k else []
    status = pytest.main([
        str(Path(__file__).parent), *chosen, "-m", "" if args.full else "not slow", "-q", "-rs", "--no-header",
        "-p", "no:cacheprovider", "--benchmark-enable", "--benchmark-quiet", f"--benchmark-json={partial}",
    ])  # fmt: skip
    if partial.exists() and partial.stat().st_size:
        partial.replace(path)
        print(f"written: {path}")
    else:
        partial.unlink(missing_ok=True)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
