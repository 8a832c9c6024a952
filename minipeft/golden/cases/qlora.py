"""Cases of qlora_forward, qlora_backward and qlora_requantize, on NF4."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from minipeft.golden.cases import File, Named, Spec, gaussian, integers
from minipeft.golden.cases.build import bounded, given, misfits, refused
from minipeft.golden.tensors import Array
from minipeft.reference import blockwise, lora
from minipeft.reference.codebook import NF4

PAPERS = ("https://arxiv.org/abs/2305.14314",)


OUTPUTS = {
    "qlora_forward": ("y",),
    "qlora_backward": ("grad_x", "grad_A", "grad_B"),
    "qlora_requantize": ("packed", "absmax"),
}


def files() -> Iterator[File]:
    """Yield the three files of the row."""
    for operation, header in {
        "qlora_forward": "y = x W^T + bias + alpha/r (x A^T) B^T, W decoded from NF4.",
        "qlora_backward": "Gradients of <grad_y, y>; the base is frozen.",
        "qlora_requantize": "NF4 of W + alpha/r B A, W decoded from NF4.",
    }.items():
        verb = {"qlora_requantize": "merge"}.get(operation, operation[6:])
        yield File(
            operation=operation,
            header=(header, "W has shape (rows of B, columns of A)."),
            source=f"minipeft.reference.qlora.{verb}",
            papers=PAPERS,
            specs=[*_cases(operation)],
        )


def _cases(operation: str) -> Iterator[Spec]:
    if operation == "qlora_requantize":
        yield from _requantized()
        return
    yield _whole(operation, "6 in, 5 out", "Basic MisalignedRows", (5, 6))
    yield _whole(operation, "16 in, 3 out", "Basic", (3, 16))
    if operation == "qlora_forward":
        spec = _whole(operation, "with bias", "Basic Bias", (5, 6))
        yield given(spec, bias=integers("bias", (5,)))
    yield _normal(operation, "12 in, 7 out", "Normal MisalignedRows", (7, 12))
    # Here no block crosses rows, as kernels for decoding ask for.
    yield _normal(operation, "24 in, 5 out", "Normal", (5, 24))
    if operation == "qlora_forward":
        spec = _whole(operation, "24 in, 5 out, with bias", "Basic Bias", (5, 24))
        yield given(spec, bias=integers("bias", (5,)))
    yield from _invalid(operation)


def _whole(operation: str, comment: str, flags: str, shape: tuple[int, int]) -> Spec:
    """Codes of -1, 0 and 1, and scales of 1, 2 and 4."""
    size, seed = shape[0] * shape[1], f"{operation} {shape}"
    picks = integers(f"{seed} codes", (size,)).astype(int) % 3
    codes = np.array([0, 7, 15], np.uint8)[picks]
    scales = integers(f"{seed} scales", (-(-size // 8),)).astype(int) % 3
    base = {
        "packed": blockwise.pack(codes, 4, fill=7),
        "absmax": np.array([1, 2, 4], np.float32)[scales],
    }
    draw = {name: integers(f"{seed} {name}", s) for name, s in _shapes(shape).items()}
    return _spec(operation, comment, flags, base | draw)


def _normal(operation: str, comment: str, flags: str, shape: tuple[int, int]) -> Spec:
    """Compared with a bound: the sums, the positions, and 5 roundings more."""
    seed = f"{operation} {shape} normal"
    q = blockwise.quantize(gaussian(f"{seed} W", shape), NF4, 8)
    draw = {name: gaussian(f"{seed} {name}", s) for name, s in _shapes(shape).items()}
    spec = _spec(
        operation, comment, flags, {"packed": q.packed, "absmax": q.absmax} | draw
    )
    W = blockwise.dequantize(q).astype(np.float64)
    exact = _answer(operation, W, spec.inputs)
    absolute = {name: np.abs(value) for name, value in draw.items()}
    sizes = _answer(operation, np.abs(W), absolute)
    return replace(
        bounded(operation, spec, sum(shape) + 2 + 2 + 5),
        outputs={name: value.astype(np.float32) for name, value in exact.items()},
        magnitudes=sizes,
    )


def _answer(operation: str, W: Array, inputs: Named) -> dict[str, Array]:
    """Compute in float64, with the base already decoded."""
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if k != "packed"}
    adapter = lora.LoRA(wide["A"], wide["B"], 2.0)
    if operation == "qlora_forward":
        return {"y": lora.forward(wide["x"], W, adapter)}
    gradients = lora.backward(wide["grad_y"], wide["x"], W, adapter)
    return dict(zip(OUTPUTS[operation], gradients, strict=True))


def _requantized() -> Iterator[Spec]:
    """Scales are powers of two and updates far from a boundary: bytes."""
    codes = integers("requantized", (64,), 7).astype(np.int64) + 8
    codes[::8] = 15  # every block of 8 holds its own scale
    base = {
        "packed": blockwise.pack(codes.astype(np.uint8), 4),
        "absmax": np.array([1, 2, 4, 1, 2, 1, 4, 2], np.float32),
    }
    A = np.zeros((2, 16), np.float32)
    A[0, 3], A[1, 12] = 1, -1
    for comment, flags, size in (
        ("1/64 at two columns", "Vanishes", 2.0**-7),
        ("6 at two columns", "Moves", 3.0),
    ):
        B = np.full((4, 2), size, np.float32)
        yield _spec("qlora_requantize", comment, flags, base | {"A": A, "B": B})
    yield from _invalid("qlora_requantize")


def _invalid(operation: str) -> Iterator[Spec]:
    """Change the adapter, whose sizes are those of the layer, and the base."""
    fine = _whole(operation, "fits", "ShapeMismatch", (5, 24))
    if operation == "qlora_requantize":
        fine = replace(
            fine, inputs={n: fine.inputs[n] for n in fine.inputs if n != "x"}
        )
    if operation == "qlora_forward":
        fine = given(fine, bias=integers("qlora fits", (5,)))
    yield from misfits(operation, fine, ())
    for name in ("packed", "absmax"):
        part = fine.inputs[name]
        for comment, change in ((f"{name} is one short", -1), (f"{name} is longer", 1)):
            other = {name: np.resize(part, len(part) + change)}
            yield refused(fine, comment, "ShapeMismatch", **other)


def _shapes(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    d, k = shape
    return {"grad_y": (2, d), "x": (2, k), "A": (2, k), "B": (d, 2)}


def _spec(operation: str, comment: str, flags: str, inputs: dict[str, Array]) -> Spec:
    inputs = dict(inputs)
    if operation != "qlora_backward":
        inputs.pop("grad_y", None)
    parameters = {"alpha": 4.0, "blocksize": 8}
    return Spec(comment, tuple(flags.split()), inputs, parameters)
