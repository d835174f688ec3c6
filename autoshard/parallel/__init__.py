"""Mechanisms lowering uses (pipeline, ring attention, experts); nothing is here yet."""
