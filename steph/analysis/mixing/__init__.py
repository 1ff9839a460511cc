"""What task vectors do when they are mixed: landscapes, alignment, dynamics, attention, controls."""
