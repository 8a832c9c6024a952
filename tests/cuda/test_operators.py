"""The torch operators: eager code agrees with the kernels, which run on this CPU."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from minipeft.errors import InputError
from minipeft.kernels import driver
from minipeft.kernels.tables import adamw_settings
from minipeft.torch import (
    adamw,
    blockwise,
    double_quant,
    launches,
    lora_batched,
    operators,
    qlora,
)
from minipeft.torch.codebook import FP4, NF3, NF4
from tests.cuda.executors import CpuLauncher
from tests.cuda.toolchain import needs_cpu_build
from tests.tolerance import gamma

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GROUP = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
LORA_BATCHED, MATMUL_4BIT = "minipeft::lora_batched", "minipeft::matmul_4bit"
SETTINGS = adamw_settings(GROUP, 3)


class Noting(CpuLauncher):
    """Runs the kernels, and notes their names."""

    def __init__(self):
        super().__init__()
        self.names = []

    def launch(self, kernel, dtype, args, stream):
        self.names.append(kernel.template)
        super().launch(kernel, dtype, args, stream)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def whole(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Draw small integers: every partial sum is exact, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype)


def weight(*shape: int, codebook: Tensor = NF4, nested: bool = False):
    codec = double_quant if nested else blockwise
    sizes = (32, 64) if nested else (32,)
    return operators.parts(codec.quantize(drawn(*shape), codebook, *sizes))


def base(rows: int, columns: int):
    """Quantize a weight of values that are small integers over 8, scaled by 8."""
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (rows * columns // 2,), generator=generator)
    absmax = torch.full((rows * columns // 32,), 8.0)
    codebook = (torch.arange(16.0) - 8) / 8
    return [packed.to(torch.uint8), absmax, codebook], [32, rows, columns]


def on_kernels(name: str, *args):
    """Run the operator as on a GPU."""
    with driver.use(CpuLauncher()):
        return operators.LAUNCHES[f"minipeft::{name}"](*args)


def same_bits(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


# The launch agrees with the eager code


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", [NF4, FP4, NF3], ids=["NF4", "FP4", "NF3"])
@pytest.mark.parametrize("nested", [False, True])
def test_decoding_gives_the_same_bits(dtype, codebook, nested):
    parts, layout = weight(65, 40, codebook=codebook, nested=nested)
    name = "dequantize_nested" if nested else "dequantize"
    eager = getattr(operators, name)(parts, layout, dtype)
    same_bits(on_kernels(name, parts, layout, dtype), eager)


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", [NF4, FP4, NF3], ids=["NF4", "FP4", "NF3"])
def test_quantizing_gives_the_same_bits(dtype, codebook):
    W = drawn(33, 21, dtype=dtype)
    for ours, theirs in zip(
        on_kernels("quantize", W, codebook, 64),
        operators.quantize(W, codebook, 64),
        strict=True,
    ):
        same_bits(ours, theirs)


@needs_cpu_build
def test_a_bad_weight_is_named():
    W = drawn(9, 13)
    W[1, 2] = torch.nan
    with pytest.raises(InputError, match=r"nan at flat index 15\b"):
        on_kernels("quantize", W, NF4, 64)


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_the_product_of_whole_numbers_has_the_same_bits(dtype, tokens):
    parts, layout = base(19, 64)
    x, bias = whole(2, tokens, 64, dtype=dtype)[0], whole(19, dtype=dtype)
    eager = operators.matmul_4bit(x, parts, layout, bias)
    same_bits(on_kernels("matmul_4bit", x, parts, layout, bias), eager)


@needs_cpu_build
@pytest.mark.parametrize("nested", [False, True])
def test_the_product_lies_within_its_roundings(nested):
    parts, layout = weight(24, 64, nested=nested)
    x = drawn(3, 64)
    decode = operators.dequantize_nested if nested else operators.dequantize
    W = decode(parts, layout, torch.float32).double()
    exact, size = x.double() @ W.T, x.abs().double() @ W.abs().T
    got = on_kernels("matmul_4bit", x, parts, layout, None).double()
    assert ((got - exact).abs() <= gamma(64) * size).all()  # 64 products and their sum


@needs_cpu_build
@pytest.mark.parametrize("shape", [(3, 60), (2, 1, 64)])
def test_what_the_kernel_does_not_take_is_decoded_and_multiplied(shape):
    parts, layout = weight(8, shape[-1])
    x = drawn(*shape)
    same_bits(
        on_kernels("matmul_4bit", x, parts, layout, None)[..., :0],
        operators.matmul_4bit(x, parts, layout, None)[..., :0],
    )
    assert on_kernels("matmul_4bit", x, parts, layout, None).shape == (*shape[:-1], 8)


@needs_cpu_build
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_with_gaps_or_at_an_odd_address_are_copied_for_the_kernel(dtype):
    parts, layout = base(19, 64)
    wide, odd = whole(3, 72, dtype=dtype), whole(1 + 3 * 64, dtype=dtype)
    bias = whole(38, dtype=dtype)[::2]
    for x in (wide[:, :64], odd[1:].view(3, 64)):
        launcher = Noting()
        with driver.use(launcher):
            got = launches.matmul_4bit(x, parts, layout, bias)
        assert launcher.names == ["product"]
        same_bits(got, operators.matmul_4bit(x, parts, layout, bias))


@pytest.mark.parametrize(
    ("dtype", "rows"),
    [("float16", {75: 16, 80: 64, 120: 64}), ("float32", {75: 4, 90: 4})],
)
def test_a_gpu_without_these_tensor_cores_shares_a_decoding_among_fewer_rows(
    monkeypatch, dtype, rows
):
    where = getattr(torch, dtype), torch.device("cuda", 1)
    for generation, most in rows.items():
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, g=generation: divmod(g, 10)
        )
        assert launches._shared(*where) == most


def test_a_dtype_that_no_kernel_writes_is_one_sentence():
    with pytest.raises(
        InputError, match=r"the kernels write no float64; choose one of"
    ):
        launches.dequantize(*weight(8, 64), torch.float64)


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_has_the_bits_of_the_optimizer(dtype):
    """Eager code, the kernel and `adamw.update` give one weight and one state."""
    W, grad = drawn(70, 60, dtype=dtype), drawn(70, 60, dtype=dtype, seed=1)
    state = adamw.init(W) | {"m": drawn(70, 60), "v": drawn(70, 60).square()}
    state["step"] = 2
    results = []
    for step in (operators.adamw_, lambda *args: on_kernels("adamw_", *args)):
        args = [W.clone(), grad, state["m"].clone(), state["v"].clone()]
        step(*args, SETTINGS)
        results.append([args[0], args[2], args[3]])
    adamw.update(W, grad, state, GROUP)
    for ours, eager, theirs in zip(*results, [W, state["m"], state["v"]], strict=True):
        same_bits(ours, eager)
        same_bits(ours, theirs)


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_in_eight_bits_has_the_bits_of_the_optimizer(dtype):
    W, grad = drawn(70, 60, dtype=dtype), drawn(70, 60, dtype=dtype, seed=1)
    state = adamw.init(W, bits=8)
    adamw.update(W, grad, state, GROUP)
    adamw.update(W, grad, state, GROUP)
    kept = {k: state[k].clone() for k in state if k != "step"}
    results = []
    for step in (operators.adamw_8bit_, lambda *args: on_kernels("adamw_8bit_", *args)):
        own = {k: v.clone() for k, v in kept.items()}
        codes, absmax = ([own[f"{m}_{k}"] for m in "mv"] for k in ("codes", "absmax"))
        value = W.clone()
        step(value, grad, codes, absmax, SETTINGS)
        results.append([value, *codes, *absmax])
    adamw.update(W, grad, state, GROUP)
    names = ("m_codes", "v_codes", "m_absmax", "v_absmax")
    for ours, eager, theirs in zip(
        *results, [W, *(state[name] for name in names)], strict=True
    ):
        same_bits(ours, eager)
        same_bits(ours, theirs)


def batch(dtype: torch.dtype):
    x, y = whole(5, 72, dtype=dtype), whole(5, 24, dtype=dtype, seed=1)
    A, B = (
        whole(3, 4, 72, dtype=dtype, seed=2),
        whole(3, 24, 4, dtype=dtype, seed=3),
    )
    indices = torch.tensor([2, -1, 0, 0, 1], dtype=torch.int32)
    return x, y, [A, B, torch.tensor([0.5, 2.0, 0.25])], indices


@needs_cpu_build
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_of_adapters_has_the_same_bits(dtype):
    args = batch(dtype)
    eager = operators.lora_batched(*args)
    same_bits(on_kernels("lora_batched", *args), eager)
    same_bits(eager[1], args[1][1])


@needs_cpu_build
@pytest.mark.parametrize("which", ["rows", "base output"])
def test_operands_of_a_batch_may_start_at_any_value(which):
    """A compiler that takes the operator into a graph cannot ask where they lie."""
    x, y, adapters, indices = batch(torch.bfloat16)
    eager = operators.lora_batched(x, y, adapters, indices)

    def odd(tensor):
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)

    x, y = (odd(x), y) if which == "rows" else (x, odd(y))
    same_bits(on_kernels("lora_batched", x, y, adapters, indices), eager)


def test_a_base_output_of_another_dtype_is_not_for_the_kernels(monkeypatch):
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    x, y, adapters, indices = batch(torch.float32)
    monkeypatch.setattr(operators, "lora_batched", operators.LAUNCHES[LORA_BATCHED])
    stacked = lora_batched.Adapters(*adapters)
    got = lora_batched.forward(x, y.bfloat16(), stacked, indices)
    assert got.dtype == torch.bfloat16


@needs_cpu_build
def test_under_autocast_the_dtype_does_not_depend_on_the_rows(monkeypatch):
    layer = qlora.QuantizedLinear.from_linear(torch.nn.Linear(64, 8))
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    monkeypatch.setattr(operators, "matmul_4bit", operators.LAUNCHES[MATMUL_4BIT])
    with driver.use(CpuLauncher()), torch.autocast("cpu", torch.bfloat16):
        for rows in (2, 70):
            assert layer(drawn(rows, 64)).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [3, -2])
def test_an_index_of_no_adapter_is_refused(wrong):
    x, y, adapters, indices = batch(torch.float32)
    indices[0] = wrong
    for run in (operators.lora_batched, operators.LAUNCHES["minipeft::lora_batched"]):
        with pytest.raises(RuntimeError, match=r"not one of -1 \(none\) to 2"):
            run(x, y, adapters, indices)


# torch's own checks: schema, fake implementation, autograd, compilation


def samples() -> dict[str, tuple]:
    moments = [torch.zeros(4096, dtype=torch.uint8) for _ in range(2)]
    absmax = [torch.zeros(16) for _ in range(2)]
    x, y, adapters, indices = batch(torch.float32)
    for tensor in (x, y, *adapters[:2]):
        tensor.requires_grad_()
    return {
        "dequantize": (*weight(8, 64), torch.float16),
        "dequantize_nested": (*weight(8, 64, nested=True), torch.float32),
        "quantize": (drawn(8, 64), NF4, 64),
        "matmul_4bit": (drawn(3, 64).requires_grad_(), *weight(8, 64), drawn(8)),
        "adamw_": (drawn(7), drawn(7), torch.zeros(7), torch.ones(7), SETTINGS),
        "adamw_8bit_": (drawn(4096), drawn(4096), moments, absmax, SETTINGS),
        "dora_row_norm": (drawn(8, 64), drawn(2, 64), drawn(8, 2), 0.5),
        "lora_batched": (x, y, adapters, indices),
    }


def test_every_operator_is_sampled():
    assert set(operators.LAUNCHES) == {f"minipeft::{name}" for name in samples()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    opcheck(getattr(operators, name), samples()[name])


@pytest.mark.parametrize("name", samples())
def test_a_gpu_gets_a_launch(name):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has(f"minipeft::{name}", "CUDA")
    assert has(f"minipeft::{name}", "CompositeExplicitAutograd")  # others run eagerly


@dataclass(frozen=True)
class Captured:
    run: Callable[..., Tensor]
    args: tuple


def compiled_programs() -> dict[str, Captured]:
    parts, layout = weight(8, 64, nested=True)

    def layer(x: Tensor) -> Tensor:
        return operators.matmul_4bit(x, parts, layout, None).relu() + 1

    def step(W: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> Tensor:
        operators.adamw_(W, grad, m, v, SETTINGS)
        return W + m + v

    x, y, adapters, indices = batch(torch.float32)
    return {
        "a layer": Captured(layer, (drawn(3, 64),)),
        "a step": Captured(step, samples()["adamw_"][:4]),
        "a batch": Captured(
            lambda x, y: operators.lora_batched(x, y, adapters, indices) * 2, (x, y)
        ),
    }


@pytest.mark.parametrize("name", compiled_programs())
def test_a_compiled_graph_goes_through(name):
    """The graph has no break and the same bits; the operator is one of its nodes."""
    program = compiled_programs()[name]
    expected = program.run(*(a.clone() for a in program.args))
    torch.compiler.reset()
    compiled = torch.compile(program.run, fullgraph=True, backend="aot_eager")
    same_bits(compiled(*(a.clone() for a in program.args)), expected)


# Gradients


@pytest.mark.parametrize("nested", [False, True])
def test_the_gradient_of_x_is_that_of_the_decoded_weight(nested):
    parts, layout = weight(8, 64, nested=nested)
    x = drawn(2, 3, 64).requires_grad_()
    grad = drawn(2, 3, 8)
    decode = operators.dequantize_nested if nested else operators.dequantize
    W = decode(parts, layout, torch.float32)
    (got,) = torch.autograd.grad(operators.matmul_4bit(x, parts, layout, None), x, grad)
    same_bits(got, grad @ W)


def test_the_gradients_of_a_batch_are_autograds():
    x, y, (A, B, scaling), indices = batch(torch.float32)
    leaves = [t.double().float().requires_grad_() for t in (x, y, A, B)]

    def one_by_one(x, y, A, B):
        rows = [
            row if i < 0 else row + scaling[i] * (B[i] @ (A[i] @ x[t]))
            for t, (row, i) in enumerate(zip(y, indices.tolist(), strict=True))
        ]
        return torch.stack(rows)

    grad = whole(5, 24, dtype=torch.float32, seed=9)
    expected = torch.autograd.grad(one_by_one(*leaves), leaves, grad)
    x, y, A, B = leaves
    out = operators.lora_batched(x, y, [A, B, scaling], indices)
    for got, wanted in zip(
        torch.autograd.grad(out, leaves, grad), expected, strict=True
    ):
        same_bits(got, wanted)


# The operands that a kernel takes


def test_a_cpu_and_a_gap_and_an_odd_address_are_not_available(monkeypatch):
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: True)
    W = drawn(8, 64)
    assert not launches.available(W)
    monkeypatch.setattr(launches, "GPUS", {"cpu"})
    assert launches.available(W, W)
    assert not launches.available(W, W.T)
    assert not launches.available(W.view(-1)[1:])
    assert not launches.available(W, W.double())
    monkeypatch.setattr(launches, "_compiler_is_here", lambda: False)
    assert not launches.available(W)


def test_without_a_compiler_one_warning_says_why(monkeypatch):
    monkeypatch.setattr(launches.compiler, "missing", lambda: "NVRTC is not found.")
    with pytest.warns(UserWarning, match=r"own operations run .* NVRTC is not found"):
        assert not launches._compiler_is_here.__wrapped__()


def test_a_launch_goes_to_the_stream_that_computes(monkeypatch):
    streams = []

    class Noting:
        def launch(self, kernel, dtype, args, stream):
            streams.append((kernel.template, stream))

    monkeypatch.setattr(launches, "_stream", lambda device: 77)
    with driver.use(Noting()):
        operators.LAUNCHES["minipeft::dequantize"](*weight(8, 64), torch.float16)
    assert streams == [("dequantize", 77)]


@pytest.mark.parametrize(
    ("name", "spoil", "sentence"),
    [
        ("dequantize", lambda a: a[0].__setitem__(1, a[0][1][:-1]), "absmax has 15"),
        ("matmul_4bit", lambda a: a.__setitem__(3, a[3].half()), "bias is float16"),
        ("matmul_4bit", lambda a: a.__setitem__(3, a[3][:-1]), r"bias has shape \(7,"),
        ("adamw_", lambda a: a.__setitem__(1, a[1][:-1]), "the gradient has shape"),
        ("adamw_", lambda a: a.__setitem__(2, a[2][:-1]), "m has 6 values; W needs 7"),
        ("adamw_8bit_", lambda a: a[3].pop(), "shorter"),
        ("dora_row_norm", lambda a: a.__setitem__(1, a[1][:, :-1].clone()), "do not"),
        (
            "dora_row_norm",
            lambda a: a.__setitem__(2, a[2].half()),
            "B is float16; give",
        ),
        ("lora_batched", lambda a: a.__setitem__(1, a[1][:-1]), r"y has shape \(4, 24"),
    ],
)
def test_what_a_kernel_would_misread_is_refused(name, spoil, sentence):
    args = list(samples()[name])
    spoil(args)
    with pytest.raises((InputError, ValueError), match=sentence):
        on_kernels(name, *args)


# The tables on a device


def test_a_table_is_made_once_outside_of_inference_mode():
    launches._uploaded.cache_clear()
    with torch.inference_mode():
        table = launches._dynamic_map(torch.device("cpu"))
    assert not table.is_inference()
    assert launches._dynamic_map(torch.device("cpu")) is table


@pytest.fixture
def captured(monkeypatch):
    """A graph is captured on the second of two GPUs; the first is the current one."""
    current = [torch.device("cuda", 0)]

    @contextmanager
    def guard(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", guard)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: current[-1].index == 1
    )
    return torch.device("cuda", 1)


def test_a_table_is_not_made_while_a_graph_is_captured(captured):
    launches._uploaded.cache_clear()
    with pytest.raises(
        InputError, match=r"table moment_maps is not on cuda:1 yet; run"
    ):
        launches._moment_maps(captured)


def test_no_graph_captures_a_step_of_the_optimizer(captured, monkeypatch):
    """A graph would freeze the rate and the step number, which the kernel is given."""
    on_cuda, seen = captured, []
    with pytest.raises(InputError, match=r"captured.*; capture forward and backward"):
        adamw.refuse_capture([torch.device("cpu"), on_cuda])
    adamw.refuse_capture([torch.device("cpu"), torch.device("cuda", 0)])
    monkeypatch.setattr(adamw, "refuse_capture", seen.append)
    adamw.AdamW([torch.nn.Parameter(torch.ones(3))]).step()
    assert seen == [{torch.device("cpu")}]


def test_whether_a_compiler_is_here_is_marked_as_torch_marks_a_constant():
    @torch.compiler.assume_constant_result
    def marked(): ...

    assert vars(marked).items() <= vars(launches._compiler_is_here).items()
