"""Holds what the compiler emitted against the plan; nothing is here yet."""
