"""Instructions counted in machine code: the shortest path that does the work."""

import numpy as np
import pytest

from minipeft import kernels
from minipeft.lab import machine_code
from minipeft.lab.gpu import banks, slots
from tests.cuda import toolchain
from tests.cuda.toolchain import needs_listing


@pytest.fixture(autouse=True)
def _compiled_once(monkeypatch):
    monkeypatch.setattr(machine_code, "disassemble", toolchain.disassemble)


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


def test_lanes_wait_for_different_words_of_one_bank():
    lane = np.arange(32)
    words = [lane, 0 * lane, 2 * lane, 32 * lane, lane % 3 * 32]
    found = [banks.passes(np.array([w])) for w in words]
    assert found == [1, 1, 2, 32, 3]
    assert banks.passes(np.array(words)) == np.mean(found)


@pytest.mark.parametrize("search", banks.SEARCHES.values())
def test_a_search_reads_the_words_on_its_way(search):
    """The last look, at a word of the table, tells the position from its neighbour."""
    position = np.arange(256).reshape(8, 32)
    *_, last = search(position)
    assert len(np.unique(last)) == 128
    assert (last.reshape(-1, 2).T[0] == last.reshape(-1, 2).T[1]).all()


def test_a_tree_spares_the_banks():
    """Of 256 sorted midpoints the first steps read one bank; 32 nodes have 32 banks."""
    position = np.random.default_rng(0).integers(0, 256, (64, 32))
    _, *tree = map(banks.passes, banks._tree(position))
    in_order = [*map(banks.passes, banks._sorted(position))]
    assert tree[:4] == [1, 1, 1, 1]
    assert 2 + sum(tree) < 11 < 30 < sum(in_order)
    assert banks.waits("dequantize") == 0 < banks.waits("adamw_8bit")


@needs_listing
def test_rows_of_x_that_share_a_decoding_add_products_and_loads():
    def busy(tokens):
        size = slots.Size(tokens=tokens)
        found = slots.cost(kernels.PRODUCT_4BIT, "bfloat16", "80", size)
        return found.pipes["tensor"], found.pipes["memory"], found.issue

    one, two, eight = map(busy, (8, 16, 64))
    assert (one[0], two[0], eight[0]) == (1, 2, 8)
    assert one[1] < two[1] < eight[1] < 3 * one[1]
    assert one[2] < two[2] < eight[2]
    assert busy(65) == eight
    passes = [slots.product_cycles(n, "80") for n in (8, 64, 67, 136)]
    assert passes[2:] == [passes[1] + passes[0], 2 * passes[1] + passes[0]]


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
