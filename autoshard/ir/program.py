"""`Program`: a jaxpr as flat lists of values and ops, ready for propagation.

Calls are written in place. A loop becomes its body (a region with a trip count) plus
`link` ops that tie the values outside to those inside, so that every later pass sees
nothing but ops with factor rules.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import RuleMissingError
from autoshard.ir.walk import Addresser, inlined

LINK = "link"

_DIM_PARAMS = (
    "axes",
    "axis",
    "broadcast_dimensions",
    "dimension",
    "dimension_numbers",
    "dimensions",
    "padding_config",
    "permutation",
    "slice_sizes",
)
"""Parameters that say which dims an op works on, which shapes alone do not."""


@dataclass(frozen=True, slots=True)
class Value:
    """One array of the program.

    Attributes:
        index: Position in `Program.values`.
        shape: Global shape.
        dtype: Element type.
        producer: Index of the op that makes it, or -1 for inputs and constants.
        region: The region it lives in.
    """

    index: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    producer: int
    region: int

    @property
    def bytes_(self) -> int:
        """Bytes of the whole, unsharded array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Op:
    """One equation, or a link that ties a loop's inside to its outside.

    Attributes:
        index: Position in `Program.ops`, which is an order of execution.
        primitive: Name of the JAX primitive, or `"link"`.
        params: The primitive's parameters; for a link `kind` and `lead`.
        inputs: Value index per operand, -1 for a literal.
        outputs: Value index per result.
        region: The region it runs in.
        address: Stable address, see `ir.walk`.
        source: The user's `file:line (function)`.
        scope: The name stack, that of enclosing calls and loops included.
    """

    index: int
    primitive: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    region: int
    address: str
    source: str
    scope: str


@dataclass(frozen=True, slots=True)
class Region:
    """A body of code that runs `trips` times for each run of its parent."""

    parent: int
    trips: int


@dataclass(frozen=True, slots=True)
class Program:
    """A traced function.

    Attributes:
        values: All arrays, by index.
        ops: All ops in order of execution.
        regions: Region 0 is the whole function.
        inputs: Value index per flat argument.
        outputs: Value index per flat result (-1 for a literal).
        input_paths: Name of each flat argument.
        fingerprint: Hash of structure and shapes, blind to names and source lines.
    """

    values: tuple[Value, ...]
    ops: tuple[Op, ...]
    regions: tuple[Region, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    input_paths: tuple[str, ...]
    fingerprint: str

    def runs(self, region: int) -> int:
        """How often a region runs in one call of the program."""
        runs = 1
        while region > 0:
            runs *= self.regions[region].trips
            region = self.regions[region].parent
        return runs


@dataclass
class _Builder:
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    regions: list[Region] = field(default_factory=lambda: [Region(-1, 1)])
    addresses: Addresser = field(default_factory=Addresser)

    def value(self, aval: Any, region: int, producer: int = -1) -> int:
        index = len(self.values)
        dtype = aval.dtype
        if not isinstance(dtype, np.dtype):  # typed PRNG keys: two 32-bit words
            dtype = np.dtype(np.uint64)
        self.values.append(Value(index, tuple(aval.shape), dtype, producer, region))
        return index

    def op(self, primitive: str, **fields: Any) -> int:
        index = len(self.ops)
        self.ops.append(Op(index=index, primitive=primitive, **fields))
        return index

    def link(
        self,
        kind: str,
        source: int,
        target: int,
        *,
        region: int,
        address: str,
        where: str,
        lead: bool,
    ) -> None:
        """Ties an existing inner value to an outer one, or an outer one to an inner."""
        index = self.op(
            LINK,
            params={"kind": kind, "lead": lead},
            inputs=(source,),
            outputs=(target,),
            region=region,
            address=address,
            source=where,
            scope="",
        )
        old = self.values[target]
        self.values[target] = Value(
            target,
            old.shape,
            old.dtype,
            index if old.producer < 0 else old.producer,
            old.region,
        )

    def walk(
        self, jaxpr: Any, inputs: Sequence[int], region: int, path: str, scope: str
    ) -> list[int]:
        opened, consts = _jaxcompat.open_jaxpr(jaxpr)
        env: dict[Any, int] = dict(zip(opened.invars, inputs, strict=True))
        for var, const in zip(opened.constvars, consts, strict=True):
            env[var] = self.value(jax.typeof(const), region)

        def read(atom: Any) -> int:
            return -1 if _jaxcompat.is_literal(atom) else env[atom]

        for eqn in opened.eqns:
            operands = [read(atom) for atom in eqn.invars]
            inner = inlined(eqn)
            # Inside a call the name stack starts anew.
            within = "/".join(filter(None, (scope, _jaxcompat.name_stack(eqn))))
            if inner is not None:
                # Literals cannot be looked up by the callee's variable.
                operands = [
                    self.value(atom.aval, region) if index < 0 else index
                    for atom, index in zip(eqn.invars, operands, strict=True)
                ]
                results = self.walk(inner, operands, region, path, within)
                results = [
                    self.value(var.aval, region) if index < 0 else index
                    for var, index in zip(eqn.outvars, results, strict=True)
                ]
            elif eqn.primitive.name == "scan":
                results = self.scan(eqn, operands, region, path, within)
            else:
                results = self.plain(eqn, operands, region, path, within)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in opened.outvars]

    def plain(
        self, eqn: Any, operands: list[int], region: int, path: str, scope: str
    ) -> list[int]:
        index = len(self.ops)
        results = [self.value(var.aval, region, index) for var in eqn.outvars]
        self.op(
            eqn.primitive.name,
            params={
                **eqn.params,
                # Literal operands still have a shape that a rule must see.
                "_operand_shapes": tuple(tuple(v.aval.shape) for v in eqn.invars),
            },
            inputs=tuple(operands),
            outputs=tuple(results),
            region=region,
            address=self.addresses.next(path, eqn),
            source=_jaxcompat.source_line(eqn),
            scope=scope,
        )
        return results

    def scan(
        self, eqn: Any, operands: list[int], region: int, path: str, scope: str
    ) -> list[int]:
        params = eqn.params
        n_consts, n_carry = _jaxcompat.scan_counts(params)
        address = self.addresses.next(path, eqn)
        where = _jaxcompat.source_line(eqn)
        inner = len(self.regions)
        self.regions.append(Region(region, params["length"]))
        opened, _ = _jaxcompat.open_jaxpr(params["jaxpr"])
        body_inputs: list[int] = []
        for i, (var, outer) in enumerate(zip(opened.invars, operands, strict=True)):
            if i < n_consts and outer >= 0:
                body_inputs.append(outer)  # loop-invariant: the same value
                continue
            value = self.value(var.aval, inner)
            body_inputs.append(value)
            if outer >= 0:
                kind = "carry_in" if i < n_consts + n_carry else "slice"
                self.link(
                    kind,
                    outer,
                    value,
                    region=inner,
                    where=where,
                    address=f"{address}:in{i}",
                    lead=kind == "slice",
                )
        body_outputs = self.walk(
            params["jaxpr"], body_inputs, inner, f"{address}/", scope
        )
        results = [self.value(var.aval, region) for var in eqn.outvars]
        pairs = [
            (i, value, result)
            for i, (value, result) in enumerate(zip(body_outputs, results, strict=True))
            if value >= 0
        ]
        # All links that run in the loop come before those that run after it.
        for i, value, result in pairs:
            carried = i < n_carry
            self.link(
                "carry" if carried else "stack",
                value,
                body_inputs[n_consts + i] if carried else result,
                region=inner,
                where=where,
                address=f"{address}:{'carry' if carried else 'out'}{i}",
                lead=not carried,
            )
        for i, value, result in pairs[: sum(i < n_carry for i, _, _ in pairs)]:
            self.link(
                "carry_out",
                value,
                result,
                region=region,
                where=where,
                address=f"{address}:out{i}",
                lead=False,
            )
        return results


def build(closed_jaxpr: Any, input_paths: Sequence[str]) -> Program:
    """Flattens a closed jaxpr into a `Program`.

    Raises:
        RuleMissingError: A control-flow primitive whose trip count is unknown.
    """
    builder = _Builder()
    opened, _ = _jaxcompat.open_jaxpr(closed_jaxpr)
    inputs = [builder.value(var.aval, 0) for var in opened.invars]
    outputs = builder.walk(closed_jaxpr, inputs, 0, "", "")
    for op in builder.ops:
        if op.primitive in ("while", "cond", "shard_map", "pallas_call"):
            raise RuleMissingError(
                f"primitive {op.primitive!r} at {op.source or op.address} is not "
                "supported yet: its cost and sharding would be a guess. Write the "
                "loop as jax.lax.scan or fori_loop with a static length, or the "
                "branch as jnp.where."
            )
    return Program(
        values=tuple(builder.values),
        ops=tuple(builder.ops),
        regions=tuple(builder.regions),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        input_paths=tuple(input_paths),
        fingerprint=_fingerprint(builder, inputs, outputs),
    )


def _fingerprint(builder: _Builder, inputs: list[int], outputs: list[int]) -> str:
    digest = hashlib.sha256()
    for value in builder.values:
        digest.update(f"{value.shape}{value.dtype}{value.region};".encode())
    for op in builder.ops:
        digest.update(f"{op.primitive}{op.inputs}{op.outputs}{op.region};".encode())
        dims = [(key, op.params[key]) for key in _DIM_PARAMS if key in op.params]
        digest.update(f"{dims};".encode())
    digest.update(f"{builder.regions}{inputs}{outputs}".encode())
    return digest.hexdigest()[:16]
