"""The registry of methods: each row of the paper's tables, and each control of our own, is one entry."""

from steph.methods.base import Inputs, Method
from steph.methods.registry import METHODS, known_method, method, title

__all__ = ["METHODS", "Inputs", "Method", "known_method", "method", "title"]
