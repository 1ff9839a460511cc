"""What a study must survive: kills, damaged files, full disks, odd input. `python -m tests.torture` runs all of it."""
