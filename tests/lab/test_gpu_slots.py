"""Instructions counted in machine code: the shortest path that does the work."""

import pytest

from minipeft import kernels
from minipeft.lab.gpu import slots
from tests.cuda.toolchain import needs_listing

# A loop with a division that may take its slow path.
LOOP = (
    "@P0 EXIT",
    "MOV R1, RZ",
    "FFMA R2, R3, R4, R5",  # 0x20
    "@!P1 BRA 0x60",
    "MOV R9, 0x50",
    "CALL.REL.NOINC 0x90",
    "@P0 BRA 0x20",  # 0x60
    "STG.E.128 [R2], R4",
    "EXIT",
    "RET.REL.NODEC R9",
    "NOP",
)


def test_a_loop_runs_as_often_as_its_work_needs_and_no_slow_path_is_taken():
    for times in (1, 2, 7):
        way = slots.cheapest(LOOP, (("FFMA", times), ("STG.E.128", 1)))
        body = [LOOP[2], LOOP[3], LOOP[6]]
        assert way == [*LOOP[:2], *body * times, *LOOP[7:9]]


def test_phases_count_in_their_order():
    with pytest.raises(ValueError, match="no way through the kernel"):
        slots.cheapest(LOOP, (("STG.E.128", 1), ("FFMA", 1)))
    assert slots.cheapest(LOOP, ()) == ["@P0 EXIT"]


def test_a_loop_that_is_left_by_a_call_on_a_predicate():
    code = ("FFMA R1, R1, R1, R1", "@P0 CALL.REL.NOINC 0x30", "BRA 0x0", "EXIT")
    assert len(slots.cheapest(code, (("FFMA", 3),))) == 3 * 3


def test_pipes_are_busy_for_the_lanes_that_they_lack():
    way = ["FFMA R1", "@P0 LOP3.LUT R2", "LDS R3", "LDG.E.128 R4", "MUFU.RSQ R5", "NOP"]
    found = slots.pipes(way, "80", 2)
    memory = (4 + 4 * 4) / 2
    rest = {"float32": 1, "multiply": 0, "tensor": 0, "special": 4, "integer": 1}
    assert found == {**rest, "memory": memory}
    assert slots.pipes(way, "90", 2)["float32"] == 0.5
    # The float32 lanes multiply integers; on 9.0 half of them do.
    assert slots.pipes(["IMAD.X R1"], "80", 1)["float32"] == 2
    assert slots.pipes(["IMAD.X R1"], "90", 1)["multiply"] == 2
    assert slots.pipes(["SHFL.BFLY R1"], "90", 1)["integer"] == 0
    found = {a: slots.pipes(["FMNMX R1"], a, 1)["integer"] for a in ("90", "100")}
    assert found == {"90": 2, "100": 1}


def test_the_time_is_that_of_the_busiest():
    cost = slots.Cost(3.0, {"integer": 4.0, "memory": 1.0})
    assert (cost.cycles, cost.limit) == (4.0, "integer")
    gpu = slots.Gpu("90", 2, 2.0**30, 2.0**40)
    assert cost.seconds(32 * 8, gpu) == 4 * 8 / (2 * 4 * 2.0**30)
    assert slots.Cost(5.0, {"integer": 4.0}).limit == "issue"


@needs_listing
@pytest.mark.parametrize("architecture", slots.ARCHITECTURES)
def test_a_tile_of_dequantize_is_loaded_waited_for_and_stored(architecture):
    work = slots.work_of(kernels.DEQUANTIZE, "bfloat16")
    code = slots.disassembled("blockwise", architecture)
    way = slots.cheapest(code["dequantize<__nv_bfloat16>"].instructions, work.phases)
    names = [slots._name(i) for i in way]
    assert sum(n.startswith("STG.E.128") for n in names) == 4
    assert sum(n.startswith("BAR.SYNC") for n in names) == 1
    # A table is read once for each value, and each value is scaled once.
    assert sum(n.startswith("LDS") for n in names) >= work.values
    assert sum(n.startswith("FMUL") for n in names) >= work.values
    cost = slots.cost(kernels.DEQUANTIZE, "bfloat16", architecture)
    assert cost.issue == len(way) / 32


@needs_listing
@pytest.mark.parametrize(
    "kernel", [k for k in kernels.KERNELS if slots.work_of(k, "float32")]
)
def test_each_kernel_has_a_way_through_it(kernel):
    for dtype in kernel.dtypes or ("float32",):
        assert slots.cost(kernel, dtype, "90").cycles > 1


def test_of_what_nothing_is_known_nothing_is_said():
    assert slots.cost(kernels.SHRINK, "float32", "90") is None
