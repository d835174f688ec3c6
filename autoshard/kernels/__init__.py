"""Kernels with their reference forms, one folder per op; nothing is here yet."""
