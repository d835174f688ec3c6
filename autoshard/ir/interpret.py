"""Evaluating a jaxpr again with constraints placed at given addresses.

What the user fixed on a mesh of their own does not survive: constraints become the
identity (the plan holds what they asked for, in its own axes), and a `shard_map` is
built again over the plan's mesh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from autoshard.ir import _jaxcompat
from autoshard.ir.errors import InputError
from autoshard.ir.rename import renamed_params, renamed_spec
from autoshard.ir.walk import Addresser, used

_jaxcompat.hide_from_source_lines(__file__)

Place = Callable[[str, str, Any], Any]
"""`(address, slot, value) -> value`; slot is `"in0"`, `"in1"`, ... or `"out0"`, ..."""

Foreign = Callable[[str, Any, list[Any]], list[Any] | None]
"""`(address, equation, operands) -> results`, or None to evaluate as usual."""


def evaluate(
    closed_jaxpr: Any,
    args: Sequence[Any],
    place: Place,
    *,
    mesh: Any = None,
    rename: Mapping[str, str] | None = None,
    foreign: Foreign | None = None,
) -> list[Any]:
    """Evaluates a jaxpr, passing operands and results of each op through `place`.

    Calls are written in place; loops, branches, manual regions and rematerialised
    calls are traced again, so `place` reaches every value. Derivative rules of custom
    functions are dropped: the jaxpr must already be differentiated.

    Args:
        closed_jaxpr: What `jax.make_jaxpr` returned.
        args: Its flat arguments.
        place: Called with the address, the slot and the value; returns the value to
            go on with. For a structure the addresses are those of its links, see
            `ir.walk`. In a manual region it is called with one device's part.
        mesh: The mesh over which each `shard_map` is built again; the user's if None.
        rename: Axis of `mesh` per axis of the user's mesh; others keep their name.
        foreign: Called with the address, the equation and the placed operands of each
            plain equation; returns its results, or None to evaluate it as usual.

    Returns:
        The flat results.

    Raises:
        InputError: A `shard_map` is manual over an axis that `mesh` does not have, or
            has in another size.

    >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) * 2)(1.0)
    >>> seen = []
    >>> [y] = evaluate(jaxpr, [0.0], lambda a, s, v: (seen.append((a, s)), v)[1])
    >>> seen
    [('sin#0', 'in0'), ('sin#0', 'out0'), ('mul#0', 'in0'), ('mul#0', 'out0')]
    """
    run = _Run(place, mesh, dict(rename or {}), foreign)
    around = jax.sharding.get_abstract_mesh()
    # A mesh that the user has set is not the plan's.
    none = around if around.manual_axes else jax.sharding.AbstractMesh((), ())
    with jax.sharding.use_abstract_mesh(none):
        return run.jaxpr(closed_jaxpr, args, "")


@dataclass(frozen=True)
class _Run:
    """One evaluation; `renaming` is None outside of a `shard_map`."""

    place: Place
    mesh: Any
    rename: dict[str, str]
    foreign: Foreign | None
    renaming: dict[str, str] | None = None
    addresses: Addresser = field(default_factory=Addresser)

    def jaxpr(self, jaxpr: Any, args: Sequence[Any], path: str) -> list[Any]:
        """Evaluates one jaxpr; `path` is what its addresses begin with."""
        opened, consts = _jaxcompat.open_jaxpr(jaxpr)
        env: dict[Any, Any] = dict(zip(opened.invars, args, strict=True))
        env.update(zip(opened.constvars, map(_jaxcompat.unbound, consts), strict=True))

        def read(atom: Any) -> Any:
            if _jaxcompat.is_literal(atom):
                return _jaxcompat.unbound(atom.val)
            return env[atom]

        last_use = {
            atom: i
            for i, eqn in enumerate(opened.eqns)
            for atom in eqn.invars
            if not _jaxcompat.is_literal(atom)
        }
        kept = {atom for atom in opened.outvars if not _jaxcompat.is_literal(atom)}
        for i, eqn in enumerate(opened.eqns):
            results = self.equation(eqn, [read(atom) for atom in eqn.invars], path)
            env.update(zip(eqn.outvars, results, strict=True))
            for atom in eqn.invars:  # free what eager evaluation would otherwise hold
                if _jaxcompat.is_literal(atom) or atom in kept or last_use[atom] != i:
                    continue
                env.pop(atom, None)
        return [read(atom) for atom in opened.outvars]

    def equation(self, eqn: Any, values: list[Any], path: str) -> list[Any]:
        called = _jaxcompat.callee(eqn)
        with _jaxcompat.at_source_line(eqn):  # what is placed gets the line as well
            if called is not None:
                return self.call(eqn, called, values, path)
            address = self.addresses.next(path, eqn)
            structure = _STRUCTURES.get(eqn.primitive.name, _Run.plain)
            return structure(self, eqn, values, address)

    def plain(self, eqn: Any, values: list[Any], address: str) -> list[Any]:
        for slot, atom in enumerate(eqn.invars):
            if not _jaxcompat.is_literal(atom):
                values[slot] = self.place(address, f"in{slot}", values[slot])
        results = None
        if _jaxcompat.is_placement(eqn):
            results = values
        elif self.foreign is not None:
            results = self.foreign(address, eqn, values)
        if results is None:
            params = eqn.params
            if self.renaming is not None:
                params = renamed_params(params, self.renaming)
            results = _jaxcompat.eval_equation(eqn, values, params)
        return [self.place(address, f"out{k}", r) for k, r in enumerate(results)]

    def through(self, address: str, value: Any) -> Any:
        """Passes a value through a link both of whose ends are here."""
        return self.place(address, "out0", self.place(address, "in0", value))

    def structs(self, variables: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
        return [_jaxcompat.struct(v.aval, self.renaming) for v in variables]

    def closed(self, fn: Callable[..., Any], variables: Sequence[Any], old: Any) -> Any:
        """`fn` traced again into a closed jaxpr in the place of `old`."""
        return _jaxcompat.like(jax.make_jaxpr(fn)(*self.structs(variables)), old)

    # -- calls -------------------------------------------------------------------

    def call(
        self,
        eqn: Any,
        called: tuple[Any, list[int] | None],
        values: list[Any],
        path: str,
    ) -> list[Any]:
        inner, taken = called
        if eqn.primitive.name in _jaxcompat.REMAT_PRIMITIVES:
            return self.remat(eqn, inner, values, path)
        asked_in, asked_out = _jaxcompat.call_shardings(eqn)
        address = ""
        if any(asked_in) or any(asked_out):
            address = self.addresses.next(path, eqn)
        for i, sharding in enumerate(asked_in):
            if sharding is not None:
                values[i] = self.through(f"{address}:in{i}", values[i])
        if taken is not None:
            values = [values[i] for i in taken]
        results = self.jaxpr(inner, values, path)
        for k, sharding in enumerate(asked_out):
            if sharding is not None:
                results[k] = self.through(f"{address}:out{k}", results[k])
        return results

    def remat(self, eqn: Any, inner: Any, values: list[Any], path: str) -> list[Any]:
        jaxpr, consts = _jaxcompat.retrace(
            lambda *xs: self.jaxpr(inner, xs, path), self.structs(eqn.invars), inner
        )
        params = {**eqn.params, "jaxpr": jaxpr}
        if isinstance(params["prevent_cse"], tuple):  # one per operand
            params["prevent_cse"] = (*[False] * len(consts), *params["prevent_cse"])
        return eqn.primitive.bind(*consts, *values, **params)

    # -- structures --------------------------------------------------------------

    def scan(self, eqn: Any, values: list[Any], address: str) -> list[Any]:
        jaxpr = eqn.params["jaxpr"]
        opened, _ = _jaxcompat.open_jaxpr(jaxpr)
        n_consts, n_carry = _jaxcompat.scan_counts(eqn.params)
        entering = _variables(eqn.invars, n_consts)
        leaving = _variables(opened.outvars, 0)
        for i in entering:
            values[i] = self.place(f"{address}:in{i}", "in0", values[i])

        def body(*xs: Any) -> list[Any]:
            inputs = list(xs)
            for i in entering:
                inputs[i] = self.place(f"{address}:in{i}", "out0", inputs[i])
            outputs = self.jaxpr(jaxpr, inputs, f"{address}/")
            for i in leaving:
                if i < n_carry:
                    outputs[i] = self.through(f"{address}:carry{i}", outputs[i])
                else:
                    outputs[i] = self.place(f"{address}:out{i}", "in0", outputs[i])
            return outputs

        params = {**eqn.params, "jaxpr": self.closed(body, opened.invars, jaxpr)}
        results = eqn.primitive.bind(*values, **params)
        return self.left(address, leaving, results)

    def left(
        self, address: str, leaving: list[int], results: Sequence[Any]
    ) -> list[Any]:
        """The results of a structure, placed."""
        results = list(results)
        for i in leaving:
            results[i] = self.place(f"{address}:out{i}", "out0", results[i])
        return results

    def while_loop(self, eqn: Any, values: list[Any], address: str) -> list[Any]:
        tests, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        n_tests, n_consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = n_tests + n_consts
        entering = _variables(eqn.invars, first)
        opened, _ = _jaxcompat.open_jaxpr(body)
        leaving = _variables(opened.outvars, 0)
        for i in entering:
            values[i] = self.place(f"{address}:in{i}", "in0", values[i])

        def run_tests(*xs: Any) -> list[Any]:
            return self.jaxpr(tests, xs, f"{address}:cond/")

        def run_body(*xs: Any) -> list[Any]:
            inputs = list(xs)
            for i in entering:
                at = i - n_tests
                inputs[at] = self.place(f"{address}:in{i}", "out0", inputs[at])
            outputs = self.jaxpr(body, inputs, f"{address}/")
            for i in leaving:
                outputs[i] = self.through(f"{address}:carry{i}", outputs[i])
            return outputs

        opened_tests, _ = _jaxcompat.open_jaxpr(tests)
        params = {
            **eqn.params,
            "cond_jaxpr": self.closed(run_tests, opened_tests.invars, tests),
            "body_jaxpr": self.closed(run_body, opened.invars, body),
        }
        results = eqn.primitive.bind(*values, **params)
        return self.left(address, leaving, results)

    def cond(self, eqn: Any, values: list[Any], address: str) -> list[Any]:
        entering = _variables(eqn.invars, 1)

        def traced(b: int, branch: Any) -> Any:
            opened, _ = _jaxcompat.open_jaxpr(branch)
            crosses = used(opened, opened.invars)

            def run(*xs: Any) -> list[Any]:
                inputs = list(xs)
                for i in entering:
                    if crosses[i - 1]:
                        at = f"{address}:{b}:in{i}"
                        inputs[i - 1] = self.through(at, inputs[i - 1])
                outputs = self.jaxpr(branch, inputs, f"{address}:{b}/")
                for k in _variables(opened.outvars, 0):
                    outputs[k] = self.through(f"{address}:{b}:out{k}", outputs[k])
                return outputs

            return self.closed(run, opened.invars, branch)

        branches = tuple(traced(b, j) for b, j in enumerate(eqn.params["branches"]))
        return eqn.primitive.bind(*values, **{**eqn.params, "branches": branches})

    def shard_map(self, eqn: Any, values: list[Any], address: str) -> list[Any]:
        params = eqn.params
        opened, _ = _jaxcompat.open_jaxpr(params["jaxpr"])
        entering = _variables(eqn.invars, 0)
        leaving = _variables(opened.outvars, 0)
        for i in entering:
            values[i] = self.place(f"{address}:in{i}", "in0", values[i])
        inside = replace(self, renaming=self.rename)

        def body(*xs: Any) -> tuple[Any, ...]:
            inputs = list(xs)
            for i in entering:
                inputs[i] = self.place(f"{address}:in{i}", "out0", inputs[i])
            outputs = inside.jaxpr(params["jaxpr"], inputs, f"{address}/")
            for k in leaving:
                outputs[k] = self.place(f"{address}:out{k}", "in0", outputs[k])
            return tuple(
                jnp.asarray(x, atom.aval.dtype) if _jaxcompat.is_literal(atom) else x
                for x, atom in zip(outputs, opened.outvars, strict=True)
            )

        mapped = jax.shard_map(
            body,
            mesh=self._mesh_for(eqn),
            in_specs=tuple(renamed_spec(s, self.rename) for s in params["in_specs"]),
            out_specs=tuple(renamed_spec(s, self.rename) for s in params["out_specs"]),
            axis_names=self._manual_axes(eqn),
            check_vma=params["check_vma"],
        )
        return self.left(address, leaving, mapped(*values))

    def _manual_axes(self, eqn: Any) -> set[str]:
        mine: frozenset[str] = eqn.params["newly_manual_axes"]
        axes = {self.rename.get(axis, axis) for axis in mine}
        around = jax.sharding.get_abstract_mesh()
        if self.mesh is not None and not around.manual_axes:
            # Nothing tells an axis of size one from a manual one, but the compiler
            # takes a region that is manual altogether more readily.
            axes |= {a for a, n in self.mesh.shape.items() if n == 1}
        return axes

    def _mesh_for(self, eqn: Any) -> Any:
        sizes = dict(eqn.params["mesh"].shape)
        around = jax.sharding.get_abstract_mesh()
        if around.manual_axes:
            return None  # inside another one: its mesh
        if self.mesh is None:
            return eqn.params["mesh"]
        for axis in sorted(eqn.params["newly_manual_axes"]):
            name = self.rename.get(axis, axis)
            if self.mesh.shape.get(name) != sizes[axis]:
                raise InputError(
                    f"shard_map at {_jaxcompat.source_line(eqn)} is manual over axis "
                    f"{axis!r} of size {sizes[axis]}, which is {name!r} here; the mesh "
                    f"it is to run on is {dict(self.mesh.shape)}. Give {name!r} that "
                    "size, or map the axis to one that has it."
                )
        return self.mesh


_STRUCTURES: dict[str, Callable[[_Run, Any, list[Any], str], list[Any]]] = {
    "cond": _Run.cond,
    "scan": _Run.scan,
    "shard_map": _Run.shard_map,
    "while": _Run.while_loop,
}


def _variables(atoms: Sequence[Any], start: int) -> list[int]:
    """Positions from `start` on that hold no literal."""
    return [
        i
        for i, atom in enumerate(atoms)
        if i >= start and not _jaxcompat.is_literal(atom)
    ]
