"""One training engine for every model, its device and precision, and the memory it takes."""
