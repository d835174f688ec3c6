"""Times that compilers note on their ops, summed over loops."""

from __future__ import annotations

import pytest

from autoshard.verify.clocks import gpu_time, tpu_time
from autoshard.verify.module import Module

LOOP = """HloModule m

%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %t = (s32[], f32[8]) parameter(0)
  %x = f32[8]{{0}} get-tuple-element(%t), index=1
  %f = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%inside, backend_config={{{inner}}}
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %r = (s32[], f32[8]) tuple(%i, %f)
}}

%inside (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %n = f32[8]{{0}} negate(%p), backend_config={{{inner}}}
}}

%test (t: (s32[], f32[8])) -> pred[] {{
  %t = (s32[], f32[8]) parameter(0)
  ROOT %c = pred[] constant(true)
}}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[], f32[8]) parameter(0)
  %y = f32[8]{{0}} get-tuple-element(%p), index=1
  %g = f32[8]{{0}} all-reduce(%y), replica_groups={{}}, backend_config={{{outer}}}
  %h = f32[8]{{0}} custom-call(%y), custom_call_target="{call}"
  ROOT %w = (s32[], f32[8]) while(%p), condition=%test, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
}}
"""


def test_cycles_of_a_loop_count_every_turn_and_those_inside_a_fusion_not():
    text = LOOP.format(
        inner='"estimated_cycles":"300"',
        outer='"estimated_cycles":"7000"',
        call="AllocateBuffer",
    )
    found = tpu_time(Module(text), 1e9)
    assert found.compute_s == pytest.approx(5 * 300e-9)
    assert found.collective_s is None
    assert found.unknown == 0


def test_a_kernel_without_cycles_and_the_sentinel_are_unknown():
    sentinel = f'"estimated_cycles":"{2**63 - 1}"'
    text = LOOP.format(inner=sentinel, outer="", call="tpu_custom_call")
    found = tpu_time(Module(text), 1e9)
    assert (found.compute_s, found.unknown) == (0.0, 2)


def test_speed_of_light_times_are_told_from_other_estimates():
    def costs(sol):
        return (
            '"reification_cost":[{"exec_time_us":99.0,"name":""},'
            f'{{"exec_time_us":{sol},"compute_time_us":0,"name":"sol"}}]'
        )

    text = LOOP.format(inner=costs(2.5), outer=costs(40), call="Sharding")
    found = gpu_time(Module(text))
    assert found.compute_s == pytest.approx(5 * 2.5e-6)
    assert found.collective_s == pytest.approx(40e-6)
    assert found.unknown == 0
