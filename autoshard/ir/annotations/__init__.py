"""Readers of every form of annotation: boxes, metadata, shardings, calls, path maps.

Each reader turns what a user wrote into `Note`s of inputs or into equations of the
jaxpr; `account` makes seeds of them and counts what arrived.
"""
