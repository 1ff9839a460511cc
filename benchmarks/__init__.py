"""Benchmarks: speed as ratios to a plain implementation and to what the machine itself can do, measured in one run.

`make bench` (`python -m benchmarks`) measures the CPU, `python -m benchmarks.gpu` an NVIDIA GPU. What the numbers mean,
and how to read them, is in ``book/speed.md``.
"""
