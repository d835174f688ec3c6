"""Predictions held against published training runs."""
