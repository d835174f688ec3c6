import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autoshard.ir.errors import AutoshardError, CheckpointError, InputError, OutputError
from autoshard.train import ByteCorpus, Trainer

TIMES = ("tokens_per_s", "mfu", "step_s")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 50)
    return ByteCorpus(path, seq=16, batch=8, seed=1)


@pytest.fixture
def quiet():
    return {"log": lambda line: None}


def metrics_of(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def weights_of(directory, step, make_step):
    """The state a finished run saved, as numpy."""
    from autoshard.train.checkpoint import Checkpoints

    run = Checkpoints(
        directory,
        identity=json.loads((directory / str(step) / "run/metadata").read_text())[
            "identity"
        ],
        plan={},
        resume=True,
    )
    restored = run.restore(make_step().abstract_state)
    run.close()
    assert restored.step == step
    assert int(restored.state.step) == step
    state = restored.state
    return jax.device_get((state.params, jax.random.key_data(state.rest["key"])))


def test_losses_come_in_order_and_fall(make_step, data, tmp_path, quiet):
    path = tmp_path / "metrics.jsonl"
    step = make_step()
    result = Trainer(
        step, data, steps=30, metrics_path=path, peak_flops_per_s=1e9, **quiet
    ).run()
    assert (result.first_step, result.last_step) == (0, 30)
    assert result.stopped_by_signal is None
    assert step.calls == len(result.losses) == 30
    assert result.losses[-1] < result.losses[0] - 1
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == list(range(30))
    assert [r["loss"] for r in records] == result.losses
    # By hand: 8 sequences of 16 tokens, 1e6 model FLOPs and 1e9 FLOP/s of peak.
    for r in records:
        assert r["tokens_per_s"] == pytest.approx(128 / r["step_s"])
        assert r["mfu"] == pytest.approx(1e-3 / r["step_s"])
    after_first_s = sum(r["step_s"] for r in records[1:])
    assert result.tokens_per_s == pytest.approx(29 * 128 / after_first_s)
    assert result.mfu == pytest.approx(29e-3 / after_first_s)


def test_the_losses_are_those_of_a_plain_loop(make_step, data, quiet):
    step = make_step()
    state, expected = step.init(4), []
    for index in range(4):
        batch = data.device_batch(index, step.batch_shardings)
        state, metrics = step(state, batch)
        expected.append(float(metrics["loss"]))
    assert Trainer(make_step(), data, steps=4, seed=4, **quiet).run().losses == expected


def test_one_step_is_in_flight_while_metrics_are_read(make_step, data, quiet):
    events = []

    class Watched:
        def __init__(self, index, value):
            self.index, self.value = index, value

        def __float__(self):
            events.append(("read", self.index))
            return float(self.value)

    step = make_step()
    step.on_step = lambda index: events.append(("dispatch", index))
    step.spoil = lambda index, m: {**m, "loss": Watched(index, m["loss"])}
    Trainer(step, data, steps=3, **quiet).run()
    assert events == [
        ("dispatch", 0),
        ("dispatch", 1),
        ("read", 0),
        ("dispatch", 2),
        ("read", 1),
        ("read", 2),
    ]


def test_a_resumed_run_equals_an_uninterrupted_one(make_step, data, tmp_path, quiet):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = {"checkpoint_every": 4, "seed": 2, **quiet}
    full = Trainer(
        make_step(),
        data,
        steps=10,
        checkpoint_dir=whole,
        metrics_path=tmp_path / "whole.jsonl",
        **options,
    ).run()

    # Dies in step 6, with the metrics of step 4 and 5 written and 4 the last saved.
    broken = make_step()

    def die(index):
        if index == 6:
            raise RuntimeError("pulled the plug")

    broken.on_step = die
    options |= {"checkpoint_dir": parts, "metrics_path": tmp_path / "parts.jsonl"}
    with pytest.raises(RuntimeError, match="pulled the plug"):
        Trainer(broken, data, steps=10, **options).run()
    assert metrics_of(tmp_path / "parts.jsonl")[-1]["step"] == 4

    rest = Trainer(make_step(), data, steps=10, resume=True, **options).run()
    assert (rest.first_step, rest.last_step) == (4, 10)
    assert rest.losses == full.losses[4:]
    assert metrics_of(tmp_path / "parts.jsonl") == metrics_of(tmp_path / "whole.jsonl")
    jax.tree.map(
        np.testing.assert_array_equal,
        weights_of(parts, 10, make_step),
        weights_of(whole, 10, make_step),
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_returns(make_step, data, tmp_path, signum):
    before = signal.getsignal(signum)
    step, lines = make_step(), []

    def send(index):
        if index == 3:
            timer = threading.Thread(target=os.kill, args=(os.getpid(), signum))
            timer.start()
            timer.join()

    step.on_step = send
    options = {"checkpoint_dir": tmp_path / "run", "log": lines.append}
    result = Trainer(step, data, steps=1000, **options).run()
    assert result.stopped_by_signal == signum
    assert result.last_step == step.calls == 4
    assert len(result.losses) == 4
    assert signal.getsignal(signum) is before
    assert any(f"stopped by {signum.name} after step 4/1000" in x for x in lines)
    again = Trainer(make_step(), data, steps=6, resume=True, **options).run()
    assert (again.first_step, again.last_step) == (4, 6)
    straight = Trainer(make_step(), data, steps=6, log=lines.append).run()
    assert result.losses + again.losses == straight.losses


@pytest.fixture
def interrupts():
    """Python's own handler of the signal; a shell starts background jobs without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_acts_at_once(make_step, data, quiet, interrupts):
    step = make_step()

    def send(index):
        if index == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    step.on_step = send
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        Trainer(step, data, steps=100, **quiet).run()
    assert step.calls == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_outside_the_main_thread(make_step, data, quiet):
    results = []
    trainer = Trainer(make_step(), data, steps=2, **quiet)
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results[0].last_step == 2


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    make_step, data, tmp_path, flip_data
):
    lines = []
    options = {
        "checkpoint_dir": tmp_path / "run",
        "checkpoint_every": 2,
        "metrics_path": tmp_path / "run" / "metrics.jsonl",
        "log": lines.append,
    }
    (tmp_path / "run").mkdir()
    full = Trainer(make_step(), data, steps=6, **options).run()
    flip_data(tmp_path / "run", 6)

    rest = Trainer(make_step(), data, steps=6, resume=True, **options).run()
    assert (rest.first_step, rest.last_step) == (4, 6)
    assert rest.losses == full.losses[4:]
    assert any("6 is damaged" in line for line in lines)
    assert [r["step"] for r in metrics_of(options["metrics_path"])] == list(range(6))


def test_a_loss_that_is_not_finite_stops_the_run(make_step, data, tmp_path, quiet):
    step = make_step()
    step.spoil = lambda index, m: m if index < 5 else {**m, "loss": jnp.float32(np.nan)}
    path = tmp_path / "metrics.jsonl"
    trainer = Trainer(
        step,
        data,
        steps=10,
        checkpoint_dir=tmp_path / "run",
        checkpoint_every=3,
        metrics_path=path,
        **quiet,
    )
    with pytest.raises(AutoshardError, match=r"step 5 is nan.*checkpoint is of step 3"):
        trainer.run()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["3"]
    assert metrics_of(path)[-1]["step"] == 4


def test_a_state_with_unsound_gradients_is_saved_later(make_step, data, tmp_path):
    step, lines = make_step(), []
    bad = {"grad_norm": jnp.float32(np.inf)}
    step.spoil = lambda index, m: {**m, **bad} if index == 1 else m
    options = {"checkpoint_dir": tmp_path / "run", "checkpoint_every": 2}
    path = tmp_path / "metrics.jsonl"
    Trainer(
        step, data, steps=4, metrics_path=path, keep=9, log=lines.append, **options
    ).run()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["3", "4"]
    assert any("no checkpoint at step 2" in line for line in lines)
    assert metrics_of(path)[1]["grad_norm"] is None


def test_other_runs_and_other_ends_are_refused(make_step, data, tmp_path, quiet):
    options = {"checkpoint_dir": tmp_path / "run", **quiet}
    Trainer(make_step(), data, steps=3, **options).run()
    again = make_step()
    with pytest.raises(CheckpointError, match="--resume"):
        Trainer(again, data, steps=3, **options).run()
    with pytest.raises(CheckpointError, match="seed: it has 0, this run 1"):
        Trainer(again, data, steps=3, seed=1, resume=True, **options).run()
    other = make_step(fingerprint="beef")
    with pytest.raises(CheckpointError, match="program: it has f00d, this run beef"):
        Trainer(other, data, steps=3, resume=True, **options).run()
    with pytest.raises(CheckpointError, match=r"optimizer: .*this run adamw"):
        Trainer(again, data, steps=3, resume=True, optimizer="adamw", **options).run()
    with pytest.raises(InputError, match="step 3, beyond the steps=2"):
        Trainer(again, data, steps=2, resume=True, **options).run()
    assert again.calls == 0
    done = Trainer(again, data, steps=3, resume=True, **options).run()
    assert (done.losses, done.tokens_per_s, done.mfu) == ([], None, None)


def test_a_run_goes_on_with_another_plan(make_step, data, tmp_path):
    lines = []
    options = {"checkpoint_dir": tmp_path / "run", "log": lines.append}
    full = Trainer(make_step(), data, steps=4, log=lines.append).run()
    Trainer(make_step(), data, steps=2, **options).run()
    rest = Trainer(make_step((2, 4)), data, steps=4, resume=True, **options).run()
    np.testing.assert_allclose(rest.losses, full.losses[2:], rtol=1e-5)
    assert any("with another plan" in line for line in lines)


def test_a_torn_metrics_line_is_dropped_and_a_foreign_file_kept(
    make_step, data, tmp_path, quiet
):
    path = tmp_path / "metrics.jsonl"
    options = {"checkpoint_dir": tmp_path / "run", "metrics_path": path, **quiet}
    Trainer(make_step(), data, steps=2, **options).run()
    kept = metrics_of(path)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    Trainer(make_step(), data, steps=3, resume=True, **options).run()
    assert metrics_of(path)[:2] == kept
    assert [r["step"] for r in metrics_of(path)] == [0, 1, 2]

    path.write_text("dear diary\nsecond page\n")
    with pytest.raises(InputError, match=r"line 1 is not a line of metrics: 'dear di"):
        Trainer(make_step(), data, steps=4, resume=True, **options).run()
    with pytest.raises(OutputError, match="already exists"):
        Trainer(make_step(), data, steps=4, metrics_path=path, **quiet).run()
    assert path.read_text().startswith("dear diary")
    nowhere = tmp_path / "absent" / "metrics.jsonl"
    with pytest.raises(OutputError, match="does not exist"):
        Trainer(make_step(), data, steps=1, metrics_path=nowhere, **quiet).run()


def test_progress_goes_to_standard_error_or_the_log(make_step, data, capsys):
    Trainer(make_step(), data, steps=20).run()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 10/20", "step 20/20"]
    assert "MFU" not in captured.err


def test_arguments_are_checked_before_anything_is_done():
    for options, message in (
        ({"steps": -1}, "steps=-1"),
        ({"steps": 1, "checkpoint_every": 0}, "checkpoint_every=0"),
        ({"steps": 1, "keep": 1}, "keep=1"),
        ({"steps": 1, "peak_flops_per_s": 0.0}, r"peak_flops_per_s=0\.0"),
        ({"steps": 1, "resume": True}, "without a checkpoint directory"),
    ):
        with pytest.raises(InputError, match=message):
            Trainer(None, None, **options)
