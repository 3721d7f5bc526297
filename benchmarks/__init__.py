"""Benchmarks. Figures are measured, counted (from ops that ran) or modelled (from counts and published peaks).

make bench, make bench-full    the pytest-benchmark suites: results/<machine>-<version>.json  (`suite.py`)
python -m benchmarks.report    tables and plots of such files
python -m benchmarks.roofline  the floor of a network's time on a GPU, unit by unit: modelled
python -m benchmarks.ratios    interleaved ratios of one network: the figures that README quotes
make gpu-check                 everything that only a GPU can show  (`gpu_check.py`)
"""
