"""How good predictions are: discrimination, calibration, groups of risk, and tests of differences."""
