"""Notebooks as commands, the gate, the book and its pages, and the doctor."""
