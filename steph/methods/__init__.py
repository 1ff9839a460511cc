"""The registry of methods: each row of the paper's tables, and each control of our own, is one entry."""

from steph.methods.registry import METHODS, Method, known_method, method

__all__ = ["METHODS", "Method", "known_method", "method"]
