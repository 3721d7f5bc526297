"""Benchmarks: pytest-benchmark suites (`make bench`) and interleaved ratios (`python -m benchmarks.ratios`)."""
