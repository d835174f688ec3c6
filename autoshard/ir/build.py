"""Building a `Program`: jaxprs flattened, structures turned into regions and links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from autoshard.ir import _jaxcompat, static
from autoshard.ir.regions import STRUCTURES
from autoshard.ir.values import LINK, Op, Region, Value
from autoshard.ir.walk import Addresser

_NOT_PLAIN = frozenset(STRUCTURES) | _jaxcompat.CALLS
_WORD = np.dtype(np.uint64)
_NOTHING = jax.dtypes.float0

_REMAT = "checkpoint"
"""Scope of what runs in a rematerialised call, as the compiler writes it."""


class Builder:
    """Collects values, ops and regions while jaxprs are walked."""

    def __init__(self) -> None:
        self.values: list[Value] = []
        self.ops: list[Op] = []
        self.regions: list[Region] = [Region(-1, 1)]
        self.callers: Any = None
        self.addresses = Addresser()
        self.scalars = static.Scalars(self.values, self.ops)
        self._scopes: dict[tuple[str, str], str] = {}

    def value(self, aval: Any, region: int, producer: int = -1) -> int:
        """A new value of the type of an abstract value."""
        index = len(self.values)
        dtype = getattr(aval, "dtype", _NOTHING)
        if not isinstance(dtype, np.dtype):  # typed PRNG keys: two 32-bit words
            dtype = _WORD
        shape = tuple(_jaxcompat.shape_of(aval))
        self.values.append(Value(index, shape, dtype, producer, region))
        return index

    def held(self, atom: Any, index: int, region: int) -> int:
        """The value of an operand; a literal gets one of its own."""
        if index < 0:
            index = self.value(atom.aval, region)
            self.scalars.learn(index, atom.val)
        return index

    def walk(
        self, jaxpr: Any, inputs: Sequence[int], region: int, path: str, scope: str
    ) -> list[int]:
        """Adds what a jaxpr does; returns the value of each result, -1 for a literal.

        Args:
            jaxpr: The jaxpr, open or closed.
            inputs: Value per argument.
            region: The region to add to.
            path: What addresses in it begin with.
            scope: Name stack of the equation it is the body of.
        """
        opened, consts = _jaxcompat.open_jaxpr(jaxpr)
        env: dict[Any, int] = dict(zip(opened.invars, inputs, strict=True))
        for var, const in zip(opened.constvars, consts, strict=True):
            env[var] = self.value(jax.typeof(const), region)
            self.scalars.learn(env[var], const)
        # This loop is most of the time that reading a program takes.
        values, ops, addresses = self.values, self.ops, self.addresses
        callers = self.callers
        literal = _jaxcompat.LITERAL
        for eqn in opened.eqns:
            operands = [-1 if type(a) is literal else env[a] for a in eqn.invars]
            # Inside a call the name stack starts anew.
            own = addresses.scope(eqn)
            within = self._join(scope, own) if scope else own
            if eqn.primitive.name in _NOT_PLAIN:
                self.callers = (eqn, callers)
                results = self._structure(eqn, operands, region, path, within)
                self.callers = callers
                env.update(zip(eqn.outvars, results, strict=True))
                continue
            index = len(ops)
            results = []
            for var in eqn.outvars:
                aval = var.aval
                dtype = getattr(aval, "dtype", _NOTHING)
                if not isinstance(dtype, np.dtype):
                    dtype = _WORD
                env[var] = out = len(values)
                shape = getattr(aval, "shape", ())
                values.append(Value(out, shape, dtype, index, region))
                results.append(out)
            ops.append(
                Op(
                    index,
                    eqn.primitive.name,
                    eqn.params,
                    tuple(operands),
                    tuple(results),
                    region,
                    addresses.next(path, eqn, own),
                    within,
                    eqn,
                    None,
                    callers,
                )
            )
        return [-1 if type(a) is literal else env[a] for a in opened.outvars]

    def _join(self, scope: str, inner: str) -> str:
        found = self._scopes.get((scope, inner))
        if found is None:
            found = self._scopes[scope, inner] = f"{scope}/{inner}" if inner else scope
        return found

    def _structure(
        self, eqn: Any, operands: list[int], region: int, path: str, scope: str
    ) -> list[int]:
        called = _jaxcompat.callee(eqn)
        if called is not None:
            return self._call(eqn, called, operands, region, path, scope)
        address = self.addresses.next(path, eqn)
        add = STRUCTURES[eqn.primitive.name]
        return add(self, eqn, operands, region, address, scope)

    # -- calls -------------------------------------------------------------------

    def _call(
        self,
        eqn: Any,
        called: tuple[Any, list[int] | None],
        operands: list[int],
        region: int,
        path: str,
        scope: str,
    ) -> list[int]:
        inner, taken = called
        if eqn.primitive.name in _jaxcompat.REMAT_PRIMITIVES:
            scope = self._join(scope, _REMAT) if scope else _REMAT
        # Literals cannot be looked up by the callee's variable.
        operands = [
            self.held(atom, index, region)
            for atom, index in zip(eqn.invars, operands, strict=True)
        ]
        asked_in, asked_out = _jaxcompat.call_shardings(eqn)
        address = ""
        if any(asked_in) or any(asked_out):
            address = self.addresses.next(path, eqn)
        for i, sharding in enumerate(asked_in):
            if sharding is not None:
                operands[i] = self._placed(
                    eqn, sharding, operands[i], region, f"{address}:in{i}", scope
                )
        if taken is not None:
            operands = [operands[i] for i in taken]
        results = self.walk(inner, operands, region, path, scope)
        results = [
            self.value(var.aval, region) if index < 0 else index
            for var, index in zip(eqn.outvars, results, strict=True)
        ]
        for k, sharding in enumerate(asked_out):
            if sharding is not None:
                results[k] = self._placed(
                    eqn, sharding, results[k], region, f"{address}:out{k}", scope
                )
        return results

    def _placed(
        self, eqn: Any, sharding: Any, value: int, region: int, address: str, scope: str
    ) -> int:
        """A sharding that a call asks for, as the constraint it amounts to."""
        old = self.values[value]
        index = len(self.ops)
        result = len(self.values)
        self.values.append(Value(result, old.shape, old.dtype, index, region))
        params = {"sharding": sharding, "unconstrained_dims": frozenset()}
        self.ops.append(
            Op(
                index,
                "sharding_constraint",
                params,
                (value,),
                (result,),
                region,
                address,
                scope,
                eqn,
                (old.shape,),
                self.callers,
            )
        )
        return result

    # -- regions -----------------------------------------------------------------

    def region(self, parent: int, trips: int, manual: dict[str, int]) -> int:
        """A new region, manual over `manual` and what its parent is manual over."""
        outer = self.regions[parent].manual
        # Most regions are not manual, or just as manual as their parent.
        self.regions.append(
            Region(parent, trips, "", {**outer, **manual} if manual else outer)
        )
        return len(self.regions) - 1

    def count(self, region: int, trips: int, note: str = "") -> None:
        """Says how often a region runs, once that is known."""
        old = self.regions[region]
        self.regions[region] = Region(old.parent, trips, note, old.manual)

    def link(
        self,
        kind: str,
        source: int,
        target: int,
        *,
        region: int,
        address: str,
        eqn: Any,
        lead: bool = False,
        names: tuple[tuple[str, ...], ...] | None = None,
    ) -> None:
        """Ties an inner value to an outer one, or an outer one to an inner."""
        index = len(self.ops)
        params: dict[str, Any] = {"kind": kind, "lead": lead}
        if names is not None:
            params["names"] = names
        self.ops.append(
            Op(
                index,
                LINK,
                params,
                (source,),
                (target,),
                region,
                address,
                "",
                eqn,
                (self.values[source].shape,),
                self.callers,
            )
        )
        old = self.values[target]
        if old.producer < 0:
            self.values[target] = Value(target, old.shape, old.dtype, index, old.region)

    def enter(self, var: Any, atom: Any, outer: int, region: int, *, same: bool) -> int:
        """A value in a region for an operand; `same` if it never changes there."""
        value = self.value(var.aval, region)
        if outer < 0:
            if same:
                self.scalars.learn(value, atom.val)
        elif same:
            self.scalars.learn(value, self.scalars.of_value(outer))
        return value


def is_rematted(op: Op) -> bool:
    """Whether an op runs in a rematerialised call, whose operands are kept apart."""
    return _REMAT in op.scope and _REMAT in op.scope.split("/")


def is_transposed(op: Op) -> bool:
    """Whether an op is of a backward pass: JAX says so in the names of its scopes."""
    return "transpose(" in op.scope
