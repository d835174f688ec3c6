import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from autoshard.ir.errors import InputError
from autoshard.train.data import CORPUS_CAP_BYTES, ByteCorpus


@pytest.fixture
def text(tmp_path):
    """4096 bytes of which each pair is unique, so that a window tells its place."""
    path = tmp_path / "text.bin"
    path.write_bytes(np.arange(2048, dtype=">u2").tobytes())
    return path


def corpus(text, **changes):
    return ByteCorpus(text, **{"seq": 16, "batch": 8, "seed": 3, **changes})


def test_a_batch_depends_on_seed_and_step_only(text):
    data, again = corpus(text), corpus(text)
    late = data.batch_at(7)
    for step in (0, 7):
        for field, rows in data.batch_at(step).items():
            assert rows.dtype == np.int32
            assert rows.shape == (8, 16)
            np.testing.assert_array_equal(rows, again.batch_at(step)[field])
    np.testing.assert_array_equal(late["tokens"], data.batch_at(7)["tokens"])
    assert (late["tokens"] != data.batch_at(8)["tokens"]).any()
    assert (late["tokens"] != corpus(text, seed=4).batch_at(7)["tokens"]).any()


def test_rows_are_windows_of_the_text_and_targets_are_the_next_byte(text):
    whole = text.read_bytes()
    batch = corpus(text).batch_at(0)
    for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
        window = bytes(tokens.astype(np.uint8)) + bytes([targets[-1]])
        assert window in whole
        assert bytes(targets.astype(np.uint8)) == window[1:]


def test_every_window_can_be_drawn(tmp_path):
    path = tmp_path / "short.txt"
    path.write_bytes(b"abcdefg")
    data = ByteCorpus(path, seq=3, batch=64, seed=0)  # 4 windows: a, b, c, d
    first = data.batch_at(0)["tokens"][:, 0]
    assert set(first.tolist()) == {ord(c) for c in "abcd"}


def test_the_shares_of_the_processes_make_the_global_batch(text):
    data = corpus(text)
    for count in (1, 2, 4, 8):
        shares = [data.local_batch_at(5, index, count) for index in range(count)]
        for field, rows in data.batch_at(5).items():
            joined = np.concatenate([share[field] for share in shares])
            np.testing.assert_array_equal(joined, rows)


def test_device_batch_reads_each_shard_alone(text):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    by = NamedSharding(mesh, P("data", "context"))
    data = corpus(text)
    read = []
    rows_of = data._rows
    data._rows = lambda step, rows: read.append(len(rows)) or rows_of(step, rows)
    batch = data.device_batch(2, {"tokens": by, "targets": by})
    assert set(read) == {2}
    expected = corpus(text).batch_at(2)
    for field, array in batch.items():
        assert array.sharding == by
        np.testing.assert_array_equal(np.asarray(array), expected[field])


def test_the_default_corpus_is_python_source():
    data = ByteCorpus(seq=64, batch=2)
    assert data.tokens_per_step == 128
    size_bytes = len(data._text)
    assert 2**20 < size_bytes < 2 * CORPUS_CAP_BYTES
    source = bytes(data._text)
    assert b"def namedtuple(" in source
    assert data.fingerprint == ByteCorpus(seq=64, batch=2).fingerprint


def test_the_fingerprint_tells_any_difference(text, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(text.read_bytes()[:-1] + b"!")
    datas = [
        corpus(text),
        corpus(other),
        corpus(text, seq=8),
        corpus(text, batch=4),
        corpus(text, seed=4),
    ]
    assert len({data.fingerprint for data in datas}) == len(datas)
    moved = tmp_path / "moved"
    moved.write_bytes(text.read_bytes())
    assert corpus(moved).fingerprint == corpus(text).fingerprint


def test_unusable_texts_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"absent\.txt cannot be read: No such file"):
        ByteCorpus(tmp_path / "absent.txt", seq=4, batch=1)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        ByteCorpus(tmp_path, seq=4, batch=1)
    path = tmp_path / "text.txt"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="is empty"):
        ByteCorpus(path, seq=4, batch=1)
    path.write_bytes(b"abcd")
    with pytest.raises(InputError, match=r"has 4 bytes; one sequence of seq=4 needs 5"):
        ByteCorpus(path, seq=4, batch=1)
    assert ByteCorpus(path, seq=3, batch=1).batch_at(0)["targets"].tolist() == [
        [98, 99, 100]
    ]


def test_unusable_arguments_are_refused(text):
    with pytest.raises(InputError, match="batch=0; it must be >= 1"):
        corpus(text, batch=0)
    with pytest.raises(InputError, match="8 sequences cannot be split over 3"):
        corpus(text).local_batch_at(0, 0, 3)
    with pytest.raises(InputError, match=r"process_index=2 is not in 0\.\.1"):
        corpus(text).local_batch_at(0, 2, 2)
    with pytest.raises(InputError, match=r"but the step takes \['x'\]"):
        corpus(text).device_batch(0, {"x": None})
