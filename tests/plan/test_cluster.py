"""Clusters: the catalogue against published numbers, the grammar, the messages."""

import itertools
import math

import pytest
from pydantic import ValidationError

from autoshard.ir.errors import InputError, NameUnknownError
from autoshard.plan.chip import Figure, Host, Link, to_toml
from autoshard.plan.cluster import Cluster, cluster, load_type, names

TYPES = [
    *("a100-40g", "a100-80g", "a100-80g-opa", "a800-80g", "b200", "b200-efa", "cpu"),
    *("gb200", "h100", "h100-96g", "h100-efa", "h200", "hf-h100", "jean-zay-a100"),
    *("tpu7x", "v100-16g", "v100-32g", "v100-32g-opa", "v4", "v5e", "v5p", "v6e"),
]
GIB = 2**30

OWN = """
name = "mine"
kind = "gpu"
about = "A test chip."
chips_per_node = { value = 4, source = "s" }
hbm_bytes = { value = 1e9, source = "s" }
hbm_bytes_per_s = { value = 1e12, source = "s" }
peak_flops_per_s.bf16 = { value = 1e14, source = "s" }
default_shape = [2, 4]
[[links]]
level = "node"
bytes_per_s = { value = 1e11, source = "s" }
latency_s = { value = 1e-6, source = "s" }
[[links]]
level = "network"
bytes_per_s = { value = 1e10, source = "s" }
latency_s = { value = 5e-6, source = "s" }
"""


@pytest.fixture
def own(tmp_path):
    def write(text=OWN):
        path = tmp_path / "own.toml"
        path.write_text(text)
        return str(path)

    return write


def figures(node):
    """All figures below a model, by walking what pydantic knows of it."""
    if isinstance(node, Figure):
        yield node
    elif isinstance(node, (list, tuple)):
        for item in node:
            yield from figures(item)
    elif isinstance(node, dict):
        yield from figures(list(node.values()))
    elif hasattr(type(node), "model_fields"):
        yield from figures([getattr(node, name) for name in type(node).model_fields])


# --- the catalogue ---


def test_names_are_the_shipped_types():
    assert names() == TYPES


@pytest.mark.parametrize("name", TYPES)
def test_type_loads_under_its_own_name_with_a_source_for_each_figure(name):
    chip = load_type(name)
    assert chip.name == name
    found = list(figures(chip))
    # Three of the chip, one peak at least, two of each link.
    assert len(found) >= 4 + 2 * len(chip.links)
    assert all(len(f.source) > 10 for f in found)
    # A placeholder is no source, however long.
    assert not any("TODO" in f.source for f in found)


@pytest.mark.parametrize("name", TYPES)
def test_inner_links_are_faster_than_outer_ones(name):
    links = load_type(name).links
    assert all(
        a.bytes_per_s.value > b.bytes_per_s.value
        and a.latency_s.value < b.latency_s.value
        for a, b in itertools.pairwise(links)
    )


# Peak of the training dtype, memory capacity in the unit of the sheet, its bandwidth,
# one direction of the innermost and of the outermost link, as the makers print them.
PUBLISHED = {
    "v100-16g": ("f16", 125e12, 16 * GIB, 900e9, 300e9 / 2, 25e9 / 8 / 8),
    "v100-32g": ("f16", 125e12, 32 * GIB, 900e9, 300e9 / 2, 4 * 100e9 / 8 / 8),
    "a100-40g": ("bf16", 312e12, 40 * GIB, 1555e9, 600e9 / 2, 200e9 / 8),
    "a100-80g": ("bf16", 312e12, 80 * GIB, 2039e9, 600e9 / 2, 200e9 / 8),
    "h100": ("bf16", 1979e12 / 2, 80 * GIB, 3.35e12, 900e9 / 2, 400e9 / 8),
    "h200": ("bf16", 1979e12 / 2, 141 * GIB, 4.8e12, 900e9 / 2, 400e9 / 8),
    "b200": ("bf16", 4.5e15 / 2, 180 * GIB, 7.7e12, 1.8e12 / 2, 400e9 / 8),
    "v4": ("bf16", 275e12, 32 * GIB, 1200e9, 50e9, 6.25e9),
    "v5e": ("bf16", 197e12, 16 * GIB, 819e9, 400e9 / 4 / 2, 6.4e12 / 8 / 256),
    "v5p": ("bf16", 459e12, 95 * GIB, 2765e9, 1200e9 / 6 / 2, 50e9 / 8),
    "v6e": ("bf16", 918e12, 32 * GIB, 1638e9, 800e9 / 4 / 2, 100e9 / 8),
    "tpu7x": ("f8", 4614e12, 192 * GIB, 7.37e12, 1200e9 / 6 / 2, 100e9 / 8),
}


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_figures_are_the_published_ones(name, published):
    dtype, flops_per_s, hbm_bytes, hbm_bytes_per_s, inner, outer = published
    chip = load_type(name)
    assert chip.peak_flops_per_s[dtype].value == pytest.approx(flops_per_s, rel=2e-3)
    assert chip.hbm_bytes_per_s.value == pytest.approx(hbm_bytes_per_s, rel=2e-3)
    assert chip.links[0].bytes_per_s.value == pytest.approx(inner)
    assert chip.links[-1].bytes_per_s.value == pytest.approx(outer)
    # CUDA and its reserve take up to 2% of what the sheet of a GPU promises.
    share = chip.hbm_bytes.value / hbm_bytes
    assert 0.98 <= share <= 1 if chip.kind == "gpu" else share == 1


@pytest.mark.parametrize(
    ("name", "chips"), [("v4", 4096), ("v5e", 256), ("v5p", 8960), ("v6e", 256)]
)
def test_largest_torus_is_the_published_pod(name, chips):
    assert math.prod(load_type(name).links[0].max_shape) == chips


def test_fp8_doubles_bf16_where_the_sheet_says_so():
    for name in ("h100", "h200", "b200", "tpu7x"):
        peaks = load_type(name).peak_flops_per_s
        ratio = peaks["f8"].value / peaks["bf16"].value
        assert ratio == pytest.approx(2, rel=1e-3)


# --- what is reached of the peaks ---


@pytest.mark.parametrize("name", TYPES)
def test_shares_are_shares(name):
    for link in load_type(name).links:
        for share in (link.efficiency, link.switch_efficiency):
            assert share is None or 0 < share.value <= 1


@pytest.mark.parametrize("name", [n for n in TYPES if load_type(n).kind == "gpu"])
def test_every_gpu_says_what_its_links_reach(name):
    node, network = load_type(name).links
    assert None not in (node.efficiency, node.half_bytes, node.launch_s)
    assert network.efficiency is not None


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *(("a100-80g-opa", "a100-80g"), ("b200-efa", "b200")),
        *(("h100-efa", "h100"), ("v100-32g-opa", "v100-32g")),
    ],
)
def test_a_chip_in_another_system_differs_by_its_network(name, base):
    own, below = load_type(name), load_type(base)
    assert own.links[0] == below.links[0]
    assert own.links[1] != below.links[1]
    for field in ("kind", "peak_flops_per_s", "hbm_bytes", "hbm_bytes_per_s"):
        assert getattr(own, field) == getattr(below, field)


@pytest.mark.parametrize("name", TYPES)
def test_a_chip_type_is_written_as_it_is_read(name, tmp_path):
    path = tmp_path / "copy.toml"
    path.write_text(to_toml(load_type(name)), encoding="utf-8")
    assert load_type(str(path)) == load_type(name)


def test_any_text_can_be_written(own, tmp_path):
    odd = load_type(own()).model_copy(update={"about": 'é "\\ \n \x7f 🙂 #'})
    path = tmp_path / "odd.toml"
    path.write_text(to_toml(odd), encoding="utf-8")
    assert load_type(str(path)) == odd


# --- the grammar ---


@pytest.mark.parametrize(
    ("spec", "name", "shape", "num_chips", "nodes"),
    [
        ("h100:64", "h100:8x8", (8, 8), 64, 8),
        ("h100:8x8", "h100:8x8", (8, 8), 64, 8),
        (" h100:8 ", "h100:1x8", (1, 8), 8, 1),
        ("h100:3", "h100:1x3", (1, 3), 3, 1),
        ("h100:4x2", "h100:4x2", (4, 2), 8, 4),
        ("v100-16g:16", "v100-16g:2x8", (2, 8), 16, 2),
        ("v5p:4x4x4", "v5p:4x4x4", (4, 4, 4), 64, 16),
        ("v5p:64", "v5p:4x4x4", (4, 4, 4), 64, 16),
        ("v5p:4", "v5p:2x2x1", (2, 2, 1), 4, 1),
        ("v5p:1", "v5p:1x1x1", (1, 1, 1), 1, 1),
        ("v5p:16", "v5p:2x2x4", (2, 2, 4), 16, 4),
        ("v5p:1024", "v5p:8x8x16", (8, 8, 16), 1024, 256),
        ("v5p:8960", "v5p:16x20x28", (16, 20, 28), 8960, 2240),
        ("v4:8x4x4", "v4:8x4x4", (8, 4, 4), 128, 32),
        ("v5e:256", "v5e:16x16", (16, 16), 256, 32),
        ("v5e:8", "v5e:2x4", (2, 4), 8, 1),
        ("v6e:4", "v6e:2x2", (2, 2), 4, 1),
        ("tpu7x:9216", "tpu7x:16x24x24", (16, 24, 24), 9216, 2304),
        ("cpu:8", "cpu:8", (8,), 8, 1),
        ("cpu:1", "cpu:1", (1,), 1, 1),
    ],
)
def test_spec_is_read_and_its_name_reads_back(spec, name, shape, num_chips, nodes):
    c = cluster(spec)
    assert (c.name, c.shape) == (name, shape)
    assert (c.num_chips, c.nodes) == (num_chips, nodes)
    assert c.chips_per_node * c.nodes == num_chips
    assert cluster(c.name) == c


@pytest.mark.parametrize(
    ("spec", "rings"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v5e:4x4", (False, False)),
        ("v5p:4x4x8", (True, True, True)),
        # Only whole cubes of 4x4x4 hang on the optical switches.
        ("v5p:2x4x4", (False, False, False)),
        ("v4:2x2x4", (False, False, False)),
        ("h100:64", ()),
        ("cpu:8", ()),
    ],
)
def test_rings_follow_the_wraparound_rule(spec, rings):
    assert cluster(spec).rings == rings


@pytest.mark.parametrize(
    ("spec", "error", "parts"),
    [
        ("h10:8", NameUnknownError, ["'h10'", "Did you mean h100", "v5p", "mine.toml"]),
        ("H100:8", NameUnknownError, ["'H100'", "Did you mean h100"]),
        ("zzzz:8", NameUnknownError, ["'zzzz'", "There are a100-40g"]),
        (":8", NameUnknownError, ["''"]),
        ("h100", InputError, ["'h100' says no number of chips", "h100:8"]),
        ("h100:", InputError, ["says no number of chips"]),
        ("h100:0", InputError, ["'h100:0' has no chips"]),
        ("v5p:4x0x4", InputError, ["has no chips; a dim of its shape is 0"]),
        ("h100:-8", InputError, ["'-8' after the colon", "(64)", "(2x8)"]),
        ("h100:many", InputError, ["'many' after the colon"]),
        ("h100:8x", InputError, ["'8x' after the colon"]),
        ("h100:٨", InputError, ["after the colon"]),
        ("v5p:1.5", InputError, ["'1.5' after the colon", "(4x4x4)"]),
        ("h100:12", InputError, ["h100:12", "nodes of 8", "take 8 or 16"]),
        ("h100:8x9", InputError, ["h100:8x9 has 9 chips in a node", "at most 8"]),
        (
            "h100:2x2x2",
            InputError,
            ["has 3 dims", "nodes x chips", "has 2", "h100:2x8"],
        ),
        ("v5e:4x4x4", InputError, ["v5e:4x4x4 has 3 dims", "has 2", "v5e:4x4"]),
        ("v5p:8x8", InputError, ["v5p:8x8 has 2 dims", "has 3", "v5p:4x4x4"]),
        ("cpu:2x4", InputError, ["cpu:2x4 has 2 dims", "has 1", "cpu:8"]),
        ("cpu:9999", InputError, ["cpu:9999", "at most 4096"]),
        ("v5e:3x4", InputError, ["not come as 3x4", "1, 2, 4, 8, 16", "16x16"]),
        ("v5e:16x32", InputError, ["not come as 16x32", "largest torus is 16x16"]),
        ("v5p:2x8x8", InputError, ["not come as 2x8x8", "all of 1, 2, 4", "of 4"]),
        ("v5p:6x6x6", InputError, ["not come as 6x6x6"]),
        ("v5e:512", InputError, ["no torus of 512", "have 256", "the largest 256"]),
        ("v5p:100", InputError, ["no torus of 100 chips", "64 and 128", "8960"]),
    ],
)
def test_wrong_spec_says_what_was_passed_and_what_is_required(spec, error, parts):
    with pytest.raises(error) as e:
        cluster(spec)
    missing = [part for part in parts if part not in str(e.value)]
    assert not missing, str(e.value)


# --- figures of a cluster ---


def test_peak_is_asked_for_by_either_name_of_a_dtype():
    c = cluster("a100-80g:8")
    assert c.peak_flops_per_s("bf16") == c.peak_flops_per_s("bfloat16") == 312e12
    assert c.peak_flops_per_s("float32") == 156e12  # TF32
    assert cluster("h100:8").peak_flops_per_s("float8_e4m3fn") == 1978.9e12


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "int4"])
def test_peak_without_a_figure_names_the_dtypes_there_are(dtype):
    with pytest.raises(InputError, match=f"v100-32g .*'{dtype}'; it has f32, f16"):
        cluster("v100-32g:8").peak_flops_per_s(dtype)


def test_fingerprint_changes_with_values_and_not_with_prose(own):
    first = cluster(own())
    prose = OWN.replace('source = "s"', 'source = "t"').replace("A test", "Another")
    assert cluster(own(prose)).fingerprint == first.fingerprint
    assert cluster(own(OWN.replace("5e-6", "6e-6"))).fingerprint != first.fingerprint
    assert cluster(own() + ":1x4").fingerprint != first.fingerprint
    assert len({cluster(f"{n}:4").fingerprint for n in TYPES}) == len(TYPES)


def test_cluster_is_a_value():
    c = cluster("v5p:64")
    assert Cluster.model_validate_json(c.model_dump_json()) == c
    assert {c: 1}[cluster("v5p:4x4x4")] == 1
    assert (str(c), repr(c)) == ("v5p:4x4x4", "Cluster(v5p:4x4x4)")
    with pytest.raises(ValidationError, match="frozen"):
        c.shape = (1, 1, 1)
    with pytest.raises(ValidationError, match="does not come as 3x3x3"):
        Cluster(chip=c.chip, shape=(3, 3, 3))


# --- a file of one's own ---


def test_own_file_is_read_with_a_count_and_with_its_default_shape(own):
    path = own()
    assert cluster(path).name == "mine:2x4"
    assert cluster(f"{path}:16").shape == (4, 4)
    assert cluster(path).hbm_bytes == 1_000_000_000
    assert cluster(path).hbm_bytes_per_s == 1e12
    assert [link.level for link in cluster(path).links] == ["node", "network"]


def test_own_file_takes_over_what_it_does_not_give(own):
    link = OWN[OWN.index('[[links]]\nlevel = "network"') :]
    mine = load_type(own('name = "mine"\nbase = "h100"\n' + link))
    base = load_type("h100")
    assert mine.name == "mine"
    assert mine.links[0] == base.links[0]
    assert mine.links[1].bytes_per_s.value == 1e10
    assert mine.links[1].efficiency is None  # a level is given whole
    assert mine.peak_flops_per_s == base.peak_flops_per_s


@pytest.mark.parametrize("base", ['"h1000"', "7", '"./other.toml"', "['h100']"])
def test_own_file_on_a_base_that_is_not_there(own, base):
    with pytest.raises(InputError, match=r"own.toml is based on .*not a chip type"):
        load_type(own(f'name = "mine"\nbase = {base}\n'))


@pytest.mark.parametrize("links", ["7", "[7]", "['node']"])
def test_own_file_on_a_base_with_links_that_are_none(own, links):
    with pytest.raises(InputError, match="links"):
        load_type(own(f'name = "mine"\nbase = "h100"\nlinks = {links}\n'))


def test_own_file_without_a_default_shape_needs_a_count(own):
    path = own(OWN.replace("default_shape = [2, 4]", ""))
    with pytest.raises(InputError, match=r"own\.toml:8, or give .* a default_shape"):
        cluster(path)


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('hbm_bytes = { value = 1e9, source = "s" }', "", ["hbm_bytes: is missing"]),
        (
            'latency_s = { value = 5e-6, source = "s" }',
            "",
            ["links.1.latency_s: is missing", "inline table"],
        ),
        ('1e9, source = "s"', "1e9", ["hbm_bytes.source: is missing"]),
        ('1e9, source = "s"', '1e9, source = " "', ["hbm_bytes.source: ", "1 char"]),
        ("value = 1e9", "value = 0", ["hbm_bytes.value: ", "greater than 0"]),
        ("value = 1e9", "value = inf", ["hbm_bytes.value: ", "finite"]),
        ("value = 1e9", 'value = "1e9"', ["hbm_bytes.value: ", "valid number"]),
        ("s.bf16", "s.bf17", ["peak_flops_per_s.bf17: ", "'bf16'"]),
        ("about =", "abuot =", ["abuot: is not a field", "about: is missing"]),
        ('kind = "gpu"', 'kind = "npu"', ["kind: ", "'gpu'"]),
        (
            'kind = "gpu"',
            'kind = "tpu"',
            ["levels ici, dcn", "these are node, network"],
        ),
        ('level = "node"', 'level = "ici"', ["links.0: torus_dims is needed"]),
        (
            'level = "node"',
            'level = "node"\nwrap_multiple = 4',
            ["links.0: wrap_multiple is not used"],
        ),
        (
            'level = "node"',
            'level = "node"\nefficiency = { value = 1.5, source = "s" }',
            ["links.0: efficiency is 1.5", "share of the peak"],
        ),
        (
            'level = "node"',
            'level = "node"\ncongestion = { value = 0.5, source = "s" }',
            ["links.0: congestion is not used", '"node"'],
        ),
        (
            'level = "network"',
            'level = "network"\nlaunch_s = { value = 1e-5, source = "s" }',
            ["links.1: launch_s is not used", '"network"'],
        ),
        ("value = 4,", "value = 4.5,", ["chips_per_node is 4.5, not whole"]),
        ('name = "mine"', 'name = "my:chip"', ["name: "]),
    ],
)
def test_own_file_with_a_fault_names_the_field(own, old, new, parts):
    assert OWN.count(old) == 1
    with pytest.raises(InputError) as e:
        cluster(own(OWN.replace(old, new)))
    missing = [part for part in [*parts, "own.toml"] if part not in str(e.value)]
    assert not missing, str(e.value)


def test_torus_bounds_must_agree_with_its_dims():
    link = load_type("v5e").links[0].model_dump() | {"torus_dims": 3}
    with pytest.raises(ValidationError, match="max_shape has 2 dims and torus_dims"):
        Link.model_validate(link)


def test_default_shape_is_checked_like_any_other(own):
    with pytest.raises(InputError, match="mine:2x5 has 5 chips in a node"):
        cluster(own(OWN.replace("[2, 4]", "[2, 5]")))


def test_file_that_is_not_toml_or_not_there_is_said_so(tmp_path):
    path = tmp_path / "own.toml"
    with pytest.raises(InputError, match=r"own\.toml cannot be read: No such file"):
        cluster(f"{path}:8")
    path.write_text("name = ")
    with pytest.raises(InputError, match=r"own\.toml is not TOML: Invalid value"):
        cluster(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"own\.toml is not TOML"):
        cluster(str(path))
    folder = tmp_path / "folder.toml"
    folder.mkdir()
    with pytest.raises(InputError, match=r"folder\.toml cannot be read: Is a dir"):
        cluster(str(folder))


def test_links_to_the_host_are_those_published():
    # PCIe of 16 lanes: 8, 16 and 32 GT/s a lane, of which 128/130 is data, about 1, 2
    # and 4 GB/s each way a lane.
    for name, lane in (("v100-32g", 1e9), ("a100-80g", 2e9), ("h100", 4e9)):
        assert cluster(f"{name}:8").chip.host.bytes_per_s.value == 16 * lane
    # 55.63 of 64 GB/s are reached.
    assert cluster("h100:8").host_bytes_per_s == pytest.approx(55.63e9, rel=1e-3)
    # 2 TB for the eight chips of a node.
    assert 8 * cluster("h100:8").host_memory_bytes == 2e12


def test_figures_of_the_host_that_nobody_published_are_errors():
    v6e = cluster("v6e:2x4")
    assert v6e.host_lacks == "host.bytes_per_s"
    assert 8 * v6e.host_memory_bytes == 1536 * 2**30
    with pytest.raises(
        InputError, match=r"v6e has no figure host.bytes_per_s.*\[host\]"
    ):
        _ = v6e.host_bytes_per_s
    assert cluster("v4:2x2x1").host_lacks == "host.memory_bytes"


def test_the_share_of_a_link_to_the_host_is_a_share():
    with pytest.raises(ValidationError, match=r"efficiency is 1.5; it is a share"):
        Host(efficiency=Figure(value=1.5, source="s"))
