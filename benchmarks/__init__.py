"""Benchmarks: ratios to a plain implementation, measured in one run on one machine. `make bench` prints the table."""
