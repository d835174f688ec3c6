import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.errors import CheckpointError, OutputError
from autoshard.train import Checkpoints

IDENTITY = {"program": "p", "data": "d", "optimizer": "sgd", "seed": 0}


def open_run(directory, *, identity=IDENTITY, **options):
    return Checkpoints(directory, identity=identity, plan={"axes": (4, 2)}, **options)


def on_mesh(shape, spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    return NamedSharding(mesh, spec)


def state_of(step, sharding=None):
    weights = np.random.default_rng(step).normal(size=(512, 256)).astype(np.float32)
    return {
        "w": jax.device_put(weights, sharding or on_mesh((4, 2), P("a", "b"))),
        "half": jnp.full((16,), step, jnp.bfloat16),
        "key": jax.random.key(step),
        "empty": {},
        "none": None,
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    raw = [
        jax.tree.map(
            lambda x: (
                jax.random.key_data(x)
                if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                else x
            ),
            tree,
        )
        for tree in (got, expected)
    ]
    jax.tree.map(np.testing.assert_array_equal, *raw)


def save_steps(directory, *steps):
    run = open_run(directory, keep=3)
    for step in steps:
        run.save(step, state_of(step))
    run.close()


def test_importing_does_not_import_orbax():
    code = "import autoshard.train, sys; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "spec", [P("a", "b"), P("b"), P()], ids=["same", "other", "replicated"]
)
def test_a_state_comes_back_whole_on_any_mesh(tmp_path, spec):
    save_steps(tmp_path, 5)
    run = open_run(tmp_path, resume=True)
    target = abstract(state_of(0, on_mesh((2, 4), spec)))
    restored = run.restore(target)
    run.close()
    assert restored.step == 5
    assert restored.plan == {"axes": [4, 2]}
    assert restored.state["w"].sharding == target["w"].sharding
    assert_same(restored.state, state_of(5))


def test_only_the_newest_are_kept(tmp_path):
    run = open_run(tmp_path / "made" / "here", keep=2)
    assert run.restore(abstract(state_of(0))) is None
    for step in (1, 2, 3):
        run.save(step, state_of(step))
    run.wait()
    assert run.steps() == [2, 3]
    run.close()


def test_flipped_bytes_are_found_and_the_step_before_is_taken(tmp_path, flip_data):
    save_steps(tmp_path, 10, 20, 30)
    flip_data(tmp_path, 20)
    flip_data(tmp_path, 30)
    lines = []
    run = open_run(tmp_path, resume=True, log=lines.append)
    restored = run.restore(abstract(state_of(0)))
    assert restored.step == 10
    assert_same(restored.state, state_of(10))
    assert len(lines) == 2
    # Found by our checksum: Orbax restores such an array without a word.
    assert "the data of w does not match its checksum" in lines[0]
    assert f"{tmp_path / '30'} is damaged" in lines[0]
    assert "going on from step 10" in lines[0]
    # The run comes to these steps again, and must be able to save them.
    assert run.steps() == [10]
    run.save(20, state_of(20))
    run.close()
    assert (tmp_path / "damaged-30").is_dir()
    run = open_run(tmp_path, resume=True)
    assert run.restore(abstract(state_of(0))).step == 20
    run.close()


@pytest.mark.parametrize("which", ["run", "state", "record", "sum"])
def test_any_other_damage_is_found_too(tmp_path, which):
    save_steps(tmp_path, 1, 2)
    record = tmp_path / "2" / "run" / "metadata"
    if which == "run":
        record.unlink()
    elif which == "state":
        for path in (tmp_path / "2" / "state").rglob("*"):
            if path.is_file():
                path.unlink()
    elif which == "record":
        record.write_text(record.read_text().replace('"seed": 0', '"seed": 1'))
    else:
        record.write_text(record.read_text()[:-9])
    run = open_run(tmp_path, resume=True, log=lambda line: None)
    assert run.restore(abstract(state_of(0))).step == 1
    run.close()


def test_data_that_cannot_be_decoded_is_damage_too(tmp_path, flip_data):
    save_steps(tmp_path, 1, 2)
    flip_data(tmp_path, 2, at=0)
    lines = []
    run = open_run(tmp_path, resume=True, log=lines.append)
    assert run.restore(abstract(state_of(0))).step == 1
    run.close()
    assert f"{tmp_path / '2'} is damaged" in lines[0]


def test_a_save_that_fails_is_an_error(tmp_path):
    run = open_run(tmp_path / "run")
    run.save(1, state_of(1))
    run.wait()
    with pytest.raises(CheckpointError, match=r"(?s)could not be written .*unharmed"):
        run.save(1, state_of(1))
    assert run.steps() == [1]
    run.close()


def test_when_all_are_damaged_nothing_begins_again_silently(tmp_path, flip_data):
    save_steps(tmp_path, 1, 2)
    flip_data(tmp_path, 1)
    flip_data(tmp_path, 2)
    run = open_run(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match=r"(?s)step 2: .*step 1: .*another one"):
        run.restore(abstract(state_of(0)))
    assert run.steps() == [1, 2]
    run.close()


def test_a_process_killed_amid_a_save_leaves_no_trace(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "2.orbax-checkpoint-tmp" / "half").write_text("x")
    run = open_run(tmp_path, resume=True)
    assert run.restore(abstract(state_of(0))).step == 1
    run.save(2, state_of(2))
    run.close()
    assert not list(tmp_path.glob("*tmp*"))


def test_another_run_is_refused_and_the_difference_is_named(tmp_path):
    save_steps(tmp_path, 7)
    other = {**IDENTITY, "seed": 1, "data": "e"}
    for resume in (False, True):
        with pytest.raises(CheckpointError) as caught:
            open_run(tmp_path, identity=other, resume=resume)
        message = str(caught.value)
        assert "holds another run (step 7)" in message
        assert "seed: it has 0, this run 1" in message
        assert "data: it has d, this run e" in message
        assert "program" not in message
        assert "Choose another directory" in message


def test_the_same_run_is_continued_only_when_asked(tmp_path):
    save_steps(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"up to step 7\. Pass --resume"):
        open_run(tmp_path)


def test_a_directory_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "2024").mkdir()
    for resume in (False, True):
        with pytest.raises(CheckpointError, match=r"holds no checkpoint .*thesis\.tex"):
            open_run(tmp_path, resume=resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2024", "thesis.tex"]
    with pytest.raises(OutputError, match="is a file"):
        open_run(tmp_path / "thesis.tex")
    with pytest.raises(CheckpointError, match="is a URL"):
        open_run("gs://bucket/run")
    with pytest.raises(CheckpointError, match="at least 2"):
        open_run(tmp_path / "new", keep=1)


def test_the_metrics_file_may_lie_in_the_directory(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    open_run(tmp_path, ignore=(path,)).close()


def test_the_record_can_be_read_by_people_and_tools(tmp_path):
    save_steps(tmp_path, 4)
    record = json.loads((tmp_path / "4" / "run" / "metadata").read_text())
    assert record["identity"] == IDENTITY
    assert record["step"] == 4
    assert set(record["checksums"]) == {"w", "half", "key"}
