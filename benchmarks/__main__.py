"""Print the table of ratios: ``python -m benchmarks``."""

from __future__ import annotations

import torch

from benchmarks.step import compare_steps


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    print("STEPH training step, 16 bags, 12 sources, K = 5, one thread, fp32 (milliseconds, medians)")
    print(f"{'dimensions':>12} {'patches':>8} {'plain':>9} {'ours':>9} {'ratio':>6}")
    for dims, patches in [("demo", 64), ("paper", 64), ("paper", 512)]:
        found = compare_steps(dims, patches)
        print(f"{dims:>12} {patches:>8} {found['plain_ms']:9.1f} {found['ours_ms']:9.1f} {found['ratio']:6.2f}")


if __name__ == "__main__":
    main()
