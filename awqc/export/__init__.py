"""Lowered graphs in formats of other runtimes."""
