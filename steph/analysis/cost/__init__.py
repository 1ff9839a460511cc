"""What methods cost: operations, seconds, memory, and what a study will take."""
