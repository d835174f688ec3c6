"""Errors that autoshard raises to its users.

Every message says what was passed, what was required, where, and what to do. The
class only decides the exit code of the command line, so that scripts can tell the
kinds apart.
"""

from __future__ import annotations


class AutoshardError(ValueError):
    """Base of every error a user can cause.

    Attributes:
        exit_code: The exit status of the command line for this kind of error.

    >>> issubclass(InfeasibleError, AutoshardError), InfeasibleError.exit_code
    (True, 4)
    """

    exit_code = 1


class NameUnknownError(AutoshardError):
    """A model, cluster, strategy, optimizer or axis name that nothing defines."""

    exit_code = 3


class InputError(AutoshardError):
    """An argument, annotation or file whose content cannot be used."""

    exit_code = 3


class NoForwardDerivativeError(InputError):
    """A forward derivative of a `jax.custom_vjp` function, which has none."""


class InfeasibleError(AutoshardError):
    """No plan of the asked space fits the cluster."""

    exit_code = 4


class PlanMismatchError(AutoshardError):
    """A plan that belongs to another program, cluster or schema version."""

    exit_code = 5


class OutputError(AutoshardError):
    """A result could not be written where it was asked for."""

    exit_code = 6


class CheckpointError(AutoshardError):
    """A checkpoint directory that holds another run, or damaged data."""

    exit_code = 7


class RuleMissingError(AutoshardError):
    """A primitive without a factor rule; never replicated in silence."""

    exit_code = 8
