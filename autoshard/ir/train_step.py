"""The train step: loss, gradients and an optax update, as one plannable function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from autoshard.ir.annotate import mark
from autoshard.ir.annotations.building import Built, build, dropped
from autoshard.ir.blocks import count_blocks
from autoshard.ir.checkpointing import checkpoint_blocks
from autoshard.ir.errors import InputError

UPDATE_SCOPE = "autoshard_update"
"""Name scope of what runs once a step, however many microbatches there are."""


_OF_MODEL = frozenset(
    ("_is_nnx", "_from_key", "_from_rngs", "_abstract", "_abstract_state")
)
"""What a `TrainStep` finds out about its model, which no schedule changes."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "params", "opt_state", "rest"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """Everything a train step reads and writes.

    Attributes:
        step: int32 scalar, number of updates made.
        params: The trainable parameters, a pytree (a nested dict for an NNX model).
        opt_state: The optax state.
        rest: Other variables of the model (batch statistics, RNG state), or {}.
    """

    step: Any
    params: Any
    opt_state: Any
    rest: Any


def path_string(path: Any) -> str:
    """A key path as `params/blocks/q`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class TrainStep:
    """A single-device train step that autoshard can plan and run.

    Make one with `train_step`. Called, it is the plain step:
    `(state, batch) -> (state, metrics)`.

    Attributes:
        loss_fn: `(model, batch) -> loss`, a float scalar; for a model that is not
            NNX, `(params, batch) -> loss`.
        optimizer: Any optax gradient transformation.
        model: Builds the model: `(nnx.Rngs) -> nnx.Module` or `(key) -> params`.
        microbatches: The batch is cut into this many pieces, gradients accumulated.
        remat: `"none"`, or what of each block is rematerialised: `"full"`, `"dots"`
            or `"save:NAME+NAME"`, see `autoshard.ir.remat.saved_by`; or a mix of them,
            see `autoshard.ir.checkpointing.checkpoint_blocks`.
    """

    loss_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    model: Callable[..., Any]
    microbatches: int = 1
    remat: str = "none"

    def with_schedule(self, *, microbatches: int, remat: str) -> TrainStep:
        """The same step with another accumulation and rematerialisation."""
        other = replace(self, microbatches=microbatches, remat=remat)
        # The model is the same: what is known of it need not be found out again.
        other.__dict__["few"] = self.few
        for name in _OF_MODEL & self.__dict__.keys():
            other.__dict__[name] = self.__dict__[name]
        return other

    # -- model -------------------------------------------------------------------

    @cached_property
    def few(self) -> dict[Any, Any]:
        """What `ir.few` makes of the step, by batch and number of microbatches."""
        return {}

    def _build(self, key: Any) -> Any:
        return build(lambda: self.model(nnx.Rngs(key) if self._is_nnx else key), None)[
            0
        ]

    @cached_property
    def _is_nnx(self) -> bool:
        """Whether `model` takes `nnx.Rngs` and makes a module.

        Other libraries' initialisers take a key and each refuses `nnx.Rngs` in its own
        way, so any error means "no" as long as the key works; else it is the user's.
        """
        if isinstance(self.model, type) and issubclass(self.model, nnx.Module):
            return True
        try:
            built, _ = self._from_rngs
        except Exception as with_rngs:
            try:
                _ = self._from_key
            except Exception:
                raise with_rngs from None
            return False
        return isinstance(built, nnx.Module)

    @cached_property
    def _from_key(self) -> tuple[Any, Built]:
        return build(lambda: self.model(jax.random.key(0)), jax.eval_shape)

    @cached_property
    def _from_rngs(self) -> tuple[Any, Built]:
        return build(lambda: self.model(nnx.Rngs(0)), nnx.eval_shape)

    @cached_property
    def _abstract(self) -> tuple[Any, Any, Any]:
        graph, params, rest = nnx.split(self._from_rngs[0], nnx.Param, ...)
        return graph, params, rest

    @cached_property
    def variables(self) -> dict[str, nnx.Variable[Any]]:
        """The variables of an NNX model by state path; none for other models."""
        if not self._is_nnx:
            return {}
        return {
            "/".join([head, *(str(part) for part in path)]): variable
            for head, state in zip(("params", "rest"), self._abstract[1:], strict=True)
            for path, variable in nnx.to_flat_state(state)
        }

    @cached_property
    def remarks(self) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
        """Old spellings of the model's annotations, and annotations that it drops."""
        if self._is_nnx:
            return tuple(self._from_rngs[1].hints), ()
        params, seen = self._from_key
        return tuple(seen.hints), tuple(dropped(params, seen))

    @property
    def calls(self) -> Any:
        """Annotations that were met before the step is traced; None for none."""
        return None

    def init(self, seed: int = 0) -> TrainState:
        """A fresh state; traceable, so it can be jitted with output shardings."""
        key = jax.random.key(seed)
        if self._is_nnx:
            _, params, rest = nnx.split(self._build(key), nnx.Param, ...)
            params, rest = nnx.to_pure_dict(params), nnx.to_pure_dict(rest)
        else:
            params, rest = self._build(key), {}
        return self._fresh(params, rest)

    def _fresh(self, params: Any, rest: Any) -> TrainState:
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.optimizer.init(params),
            rest=rest,
        )

    def abstract_state(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s; nothing is computed."""
        return jax.tree.map(lambda x: x, self._abstract_state)

    @cached_property
    def _abstract_state(self) -> TrainState:
        if self._is_nnx:
            params, rest = (nnx.to_pure_dict(part) for part in self._abstract[1:])

            # An optimizer computes with what it is given, which shapes alone do not
            # allow, so they are arguments of what is traced.
            def shapes(fresh: Callable[[Any], TrainState]) -> TrainState:
                return jax.eval_shape(fresh, params)

            state = build(lambda params: self._fresh(params, rest), shapes)[0]
        else:
            state = build(lambda: self.init(0), jax.eval_shape)[0]
        # Under a mesh with Explicit axes shapes come with shardings nobody asked for.
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)

    def _loss(self, params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        if not self._is_nnx:
            return _scalar(self.loss_fn(params, batch)), rest
        graph, params_like, rest_like = self._abstract
        states = []
        for like, pure in ((params_like, params), (rest_like, rest)):
            state = jax.tree.map(lambda x: x, like)
            nnx.replace_by_pure_dict(state, pure)
            states.append(state)
        module = nnx.merge(graph, *states)
        loss = _scalar(self.loss_fn(module, batch))
        _, _, rest_after = nnx.split(module, nnx.Param, ...)
        return loss, nnx.to_pure_dict(rest_after)

    # -- the step ----------------------------------------------------------------

    def blocks(self, batch: Any) -> int:
        """How many blocks `remat` is of; 0 where nothing repeats.

        Args:
            batch: Arrays, or `jax.ShapeDtypeStruct`s.
        """
        state = self.abstract_state()
        return count_blocks(self._loss, state.params, state.rest, batch)

    def loss_and_gradients(self, state: TrainState, batch: Any) -> tuple[Any, Any, Any]:
        """Loss, gradients and other variables of one batch, microbatches included."""
        loss_fn = self._loss
        if self.remat != "none":
            loss_fn = checkpoint_blocks(loss_fn, self.remat)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def one(params: Any, rest: Any, batch: Any) -> tuple[Any, Any, Any]:
            (loss, rest), grads = grad_fn(params, rest, batch)
            return loss, _marked(grads), rest

        count = self.microbatches
        if count == 1:
            return one(state.params, state.rest, batch)
        pieces = self.pieces(batch)

        def body(carry: Any, piece: Any) -> tuple[Any, None]:
            total, acc, rest = carry
            params, piece = _in_step(state.params, piece)
            loss, grads, rest = one(params, rest, piece)
            acc = _marked(jax.tree.map(jnp.add, acc, grads))
            return (total + loss, acc, rest), None

        zeros = _marked(jax.tree.map(jnp.zeros_like, state.params))
        start = (jnp.zeros((), jnp.float32), zeros, state.rest)
        (total, acc, rest), _ = jax.lax.scan(body, start, pieces)
        with jax.named_scope(UPDATE_SCOPE):
            grads = jax.tree.map(lambda g: g / count, acc)
            return total / count, grads, rest

    def pieces(self, batch: Any) -> Any:
        """The microbatches of a batch, [microbatches, ...] per leaf."""
        cut = partial(_cut, count=self.microbatches)
        return jax.tree_util.tree_map_with_path(cut, batch)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Any]:
        """Runs one step on one device: the new state, and loss and gradient norm."""
        loss, grads, rest = self.loss_and_gradients(state, batch)
        with jax.named_scope(UPDATE_SCOPE):
            norm = optax.tree.norm(grads)
            updates, opt_state = self.optimizer.update(
                grads, state.opt_state, state.params
            )
            params = optax.apply_updates(state.params, updates)
            new = TrainState(state.step + 1, params, opt_state, rest)
        return new, {"loss": loss, "grad_norm": norm}


def _scalar(loss: Any) -> Any:
    if jnp.ndim(loss) != 0:
        raise InputError(
            f"the loss function returned an array of shape {jnp.shape(loss)}; it must "
            "return a scalar (take the mean)."
        )
    return loss


def _marked(grads: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, g: mark(g, "gradient", "params/" + path_string(path)), grads
    )


def _in_step(params: Any, piece: Any) -> tuple[Any, Any]:
    """Ties the parameters to a microbatch: what is gathered for it is not kept.

    The compiler would move the gather of sharded parameters out of the loop, and with
    it all of their memory into it.
    """
    leaves, tree = jax.tree.flatten(piece)
    plain = [
        k
        for k, x in enumerate(leaves)
        if not jnp.issubdtype(x.dtype, jax.dtypes.extended)
    ]
    given = [leaves[k] for k in plain]
    tied = jax.lax.optimization_barrier(given)
    # One by one: in one barrier for all, no layer would be wired like another.
    params = jax.tree.map(lambda x: jax.lax.optimization_barrier((x, given))[0], params)
    for k, leaf in zip(plain, tied, strict=True):
        leaves[k] = leaf
    return params, jax.tree.unflatten(tree, leaves)


def _cut(path: Any, x: Any, *, count: int) -> Any:
    """[batch, ...] -> [count, batch / count, ...], each device keeping its own rows.

    The rows of one microbatch are `count` apart, so a batch sharded over devices is
    cut without moving a row; the mean over all microbatches is the same. A leaf without
    dims has no rows: a number is the same for every microbatch, and of a random key
    each gets its own (`jax.random.fold_in` of its number).
    """
    if x.ndim == 0:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.vmap(lambda k: jax.random.fold_in(x, k))(jnp.arange(count))
        return jnp.broadcast_to(x, (count,))
    if x.shape[0] % count:
        raise InputError(
            f"batch leaf {path_string(path)!r} of shape {tuple(x.shape)} cannot be cut "
            f"into {count} microbatches: its leading dim must be divisible by {count}."
        )
    rows = x.shape[0] // count
    return jnp.moveaxis(x.reshape(rows, count, *x.shape[1:]), 1, 0)


def train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    model: Callable[..., Any],
) -> TrainStep:
    """Makes a train step from a loss function and an optax optimizer.

    Args:
        loss_fn: `(model, batch) -> loss`; a float scalar, the mean over the batch. For
            a model that is not NNX the first argument is the parameters.
        optimizer: Any `optax.GradientTransformation`.
        model: Builds the model: `(nnx.Rngs) -> nnx.Module`, or `(key) -> params` for
            any other library.

    Returns:
        A `TrainStep`: the plain single-device step when called, and what `search` and
        `parallelize` take.

    Raises:
        InputError: An argument is not callable or no optax transformation.

    >>> import optax
    >>> step = train_step(
    ...     lambda w, x: ((x @ w) ** 2).mean(),
    ...     optax.sgd(0.1),
    ...     model=lambda key: jax.random.normal(key, (4, 2)),
    ... )
    >>> state, metrics = step(step.init(0), jnp.ones((8, 4)))
    >>> int(state.step)
    1
    """
    if not callable(loss_fn) or not callable(model):
        raise InputError(
            "train_step needs loss_fn=(model, batch) -> loss and "
            f"model=(rngs) -> Module; got {loss_fn!r} and {model!r}."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(
            f"train_step needs an optax optimizer such as optax.adamw(1e-3); got "
            f"{optimizer!r}."
        )
    return TrainStep(loss_fn=loss_fn, optimizer=optimizer, model=model)
