# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: from a single-device model to a sharded run
#
# You write a model and a loss as if there were one device. autoshard reads that
# program, searches how to spread it over a cluster, writes the answer down as a
# *plan*, and runs the plan.
#
# This notebook runs in about a minute on a laptop. It needs no accelerator: the CPU is
# made to look like eight devices, and the search for 64 H100s needs no device at all.

# %%
import jax

# Both lines must come before anything uses a device.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import autoshard as ash
from autoshard.report import compare

# %% [markdown]
# ## 1. A model, written for one device
#
# A small transformer over bytes, in Flax NNX. Nothing in it knows of a mesh. The only
# thing added are *names for dims*: each weight says what its dims mean
# (`"embed"`, `"heads"`, `"mlp"`, ...), and one activation is named with
# `ash.annotate`, which does nothing on one device. A name is a hint to the search, not
# an instruction: it does not say over which devices a dim is split.


# %%
def weight(rngs, **dims):
    """A parameter of shape `dims.values()` whose dims are called `dims.keys()`."""
    value = 0.02 * jax.random.normal(rngs.params(), tuple(dims.values()))
    return nnx.Param(value, out_sharding=tuple(dims))


class Block(nnx.Module):
    def __init__(self, embed, heads, rngs):
        self.norm1 = nnx.RMSNorm(embed, rngs=rngs)
        self.norm2 = nnx.RMSNorm(embed, rngs=rngs)
        size = {"heads": heads, "head_dim": embed // heads}
        self.query = weight(rngs, embed=embed, **size)
        self.key = weight(rngs, embed=embed, **size)
        self.value = weight(rngs, embed=embed, **size)
        self.out = weight(rngs, **size, embed=embed)
        self.up = weight(rngs, embed=embed, mlp=4 * embed)
        self.down = weight(rngs, mlp=4 * embed, embed=embed)

    def __call__(self, x):
        y = self.norm1(x)
        q, k, v = (
            jnp.einsum("bse,ehd->bshd", y, w[...])
            for w in (self.query, self.key, self.value)
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + jnp.einsum("bshd,hde->bse", mixed, self.out[...])
        x = x + jax.nn.gelu(self.norm2(x) @ self.up[...]) @ self.down[...]
        return ash.annotate(x, "batch", "seq", "embed")


class ByteModel(nnx.Module):
    def __init__(self, embed, heads, layers, rngs):
        self.table = weight(rngs, vocab=256, embed=embed)
        self.blocks = nnx.List([Block(embed, heads, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(embed, rngs=rngs)

    def __call__(self, tokens):
        x = self.table[...][tokens]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.table[...].T


# %% [markdown]
# ## 2. A train step
#
# A train step is a loss, an optax optimizer, and a function that builds the model.
# Passing the function rather than a model lets autoshard look at a model of any size
# without making it, and later make each piece on the device where it belongs.


# %%
def loss_fn(model, batch):
    logits = model(batch["tokens"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return losses.mean()


def build(rngs):
    return ByteModel(embed=128, heads=4, layers=2, rngs=rngs)


step = ash.train_step(loss_fn, optax.adamw(1e-3), model=build)

# %% [markdown]
# It is still a plain function, `(state, batch) -> (state, metrics)`. On one device:

# %%
BATCH, SEQ = 16, 128
data = ash.ByteCorpus(batch=BATCH, seq=SEQ)  # the source code of Python's own library

_, single = jax.jit(step)(step.init(seed=0), data.batch_at(0))
print("loss of the first step on one device:", float(single["loss"]))


# %% [markdown]
# ## 3. Search a plan
#
# The search needs the step and the *shape* of a batch. `"cpu:8"` is the eight virtual
# devices from above.


# %%
def batch_shape(batch, seq):
    leaf = jax.ShapeDtypeStruct((batch, seq), jnp.int32)
    return {"tokens": leaf, "targets": leaf}


plan = ash.search(step, batch_shape(BATCH, SEQ), cluster="cpu:8", executable=True)
plan

# %% [markdown]
# How to read it, from the top:
#
# * **mesh**: the devices as a grid with named axes. `data` splits the batch, `fsdp`
#   splits the batch and also what lies in memory, `tensor` splits the weights' own
#   dims. An axis that is not listed has size 1.
# * **rules**: which of your dim names go to which mesh axes in computation.
# * **storage**: mesh axes that additionally split parameters, gradients and optimizer
#   state while they lie in memory.
# * **predicted**: time of a step and memory of a device, by what they are spent on.
# * **certificate**: how many candidates were priced, and how far the plan can be from
#   the best of them. The predictions are those of a model of the cluster; for virtual
#   devices that share a processor they are only an order of magnitude.
#
# The folded parts list every tensor and every collective. They are plain data too. A
# tensor has two specs: how it lies in memory, and how the op that uses it wants it.
# Where the two differ, the plan has a collective:

# %%
up = next(t for t in plan.tensors if t.path == "params/blocks/0/up")
print("shape   ", dict(zip(up.logical, up.shape, strict=True)))
print("storage ", up.storage)
print("compute ", up.compute)

# %% [markdown]
# Each collective says what it moves, how often and how much, and which line of your
# code needs it (in a notebook, the "file" is a cell). Those that move this weight, or
# its gradient:

# %%
for c in plan.predicted.collectives:
    if up.path in c.value:
        what = f"{c.kind} over {'+'.join(c.axes)} of {c.bytes_ // 1024} KiB"
        print(f"{what:38} {c.value:32} {Path(c.source).name}")

# %% [markdown]
# ## 4. Plan for a cluster that you do not have
#
# The same model code, 32 times wider and four times deeper, for 64 H100s. No array is
# made and no GPU is needed. `top=3` returns the three best plans instead of one.


# %%
def build_large(rngs):
    return ByteModel(embed=4096, heads=32, layers=8, rngs=rngs)


large = ash.train_step(loss_fn, optax.adamw(1e-4), model=build_large)
shape = batch_shape(256, 2048)


def mesh_of(plan):
    return " ".join(f"{a.axis}={a.size}" for a in plan.axes if a.size > 1)


plans = ash.search(large, shape, cluster="h100:64", top=3)
print(f"{plans[0].program.params / 1e9:.1f} billion parameters")
for rank, p in enumerate(plans, 1):
    print(f"{rank}. {p.predicted.step_s:.3f} s a step  {mesh_of(p)}")

# %% [markdown]
# A *strategy* is a plan with holes that the search fills. The default, `"auto"`, is
# nothing but holes. The shipped ones with a name fix what a published method fixes,
# and so can a TOML file of your own. Fixing more can only make the prediction slower:

# %%
for name in ("auto", "fsdp", "megatron-sp"):
    p = ash.search(large, shape, cluster="h100:64", strategy=name)
    memory_gib = p.predicted.memory.total / 2**30
    print(f"{name:12} {p.predicted.step_s:.3f} s  {memory_gib:5.1f} GiB  {mesh_of(p)}")

fsdp = ash.search(large, shape, cluster="h100:64", strategy="fsdp")
print("\na = auto, b = fsdp:", compare(plans[0], fsdp)["verdict"])

# %% [markdown]
# What would fill the memory of a GPU under the best plan:

# %%
_ = ash.plot_memory(plans[0])

# %% [markdown]
# ## 5. Run the plan
#
# A plan is a file: it can be searched here and run elsewhere. Loading it and asking
# for a parallel step checks that it was made for this very program.

# %%
path = Path(tempfile.mkdtemp()) / "quickstart.plan.json"
plan.save(path)

parallel = ash.parallelize(step, ash.load_plan(path))
state = parallel.init(seed=0)  # each device makes its own part
print(state.params["blocks"][0]["up"].sharding.spec)

# %% [markdown]
# The parallel step computes what the single-device step computes, up to rounding:

# %%
_, first = parallel(state, data.device_batch(0, parallel.batch_shardings))
print("one device:   ", float(single["loss"]))
print("eight devices:", float(first["loss"]))
np.testing.assert_allclose(first["loss"], single["loss"], rtol=1e-5)

# %% [markdown]
# Calling `parallel` in a loop of your own is enough to train. `ash.Trainer` is such a
# loop with progress, metrics, and checkpoints from which a run that was killed goes on
# exactly where it was (`checkpoint_dir=...`, `resume=True`).

# %%
result = ash.Trainer(parallel, data, steps=60, log=print).run()
assert result.losses[-1] < result.losses[0] - 1

# %%
_ = ash.plot_losses(result.losses)

# %% [markdown]
# ## Where to go from here
#
# * `autoshard search`, `explain`, `compare` and `run` do all of this in a terminal.
# * If you build an annotated model outside of autoshard, do so under
#   `with nnx.use_eager_sharding(False):`. Otherwise Flax takes the names for mesh axes.
# * A model that is not NNX works too: give `train_step` a `model` that maps a random
#   key to any pytree of parameters, and a loss of `(params, batch)`.
