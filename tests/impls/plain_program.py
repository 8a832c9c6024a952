"""NF4 quantization and LoRA in plain Python, without NumPy: a program for `--exec`.

The program shares no line with minipeft and computes in another way, LoRA over the
rationals. So it checks the vectors themselves a second time.
"""

import json
import math
import struct
import sys
from fractions import Fraction
from itertools import pairwise

TABLE = "000080bfb13932bf306b06bfa032cabe4da291be3f353dbe7178babd00000000"
TABLE += "fffaa23de3ca243edd047c3e3a03ad3eb8a4e13eab07103fb313393f0000803f"


def single(value):
    """Round to float32."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def unpack(tensor):
    data = bytes.fromhex(tensor["data"])
    if tensor["dtype"] == "bfloat16":
        data = b"".join(b"\0\0" + data[i : i + 2] for i in range(0, len(data), 2))
    code = {"float16": "e", "uint8": "B", "float64": "d"}.get(tensor["dtype"], "f")
    return [v[0] for v in struct.iter_unpack(f"<{code}", data)]


def tensor(values, shape):
    data = struct.pack(f"<{len(values)}f", *values).hex()
    return {"dtype": "float32", "shape": shape, "data": data}


def nf4_quantize(inputs, blocksize):
    W = unpack(inputs["W"])
    assert blocksize > 0, "the block size must be positive"
    assert blocksize & (blocksize - 1) == 0, "the block size must be a power of two"
    assert all(map(math.isfinite, W)), "W is not finite"
    table = unpack({"dtype": "float32", "data": TABLE})
    middle = [single((a + b) / 2) for a, b in pairwise(table)]
    codes, absmax = [], []
    for start in range(0, len(W), blocksize):
        block = W[start : start + blocksize]
        scale = max(map(abs, block))
        absmax.append(scale)
        # In float64 a product of two float32 is exact; a quotient may round twice.
        lift = 2.0**64 if scale < 2.0**-126 else 1.0
        inverse = single(1 / (scale * lift)) if scale else 1.0
        for w in block:
            scaled = single(w * lift * inverse)
            codes.append(sum(m < scaled for m in middle))
    codes += [7] * (len(codes) % 2)
    packed = bytes(a << 4 | b for a, b in zip(codes[::2], codes[1::2], strict=True))
    return {
        "packed": {"dtype": "uint8", "shape": [len(packed)], "data": packed.hex()},
        "absmax": tensor(absmax, [len(absmax)]),
    }


def lora_forward(inputs, alpha, rank_stabilized):
    (out, width), r = inputs["W"]["shape"], inputs["A"]["shape"][0]
    assert inputs["A"]["shape"] == [r, width], "A does not fit"
    assert inputs["B"]["shape"] == [out, r], "B does not fit"
    assert inputs["x"]["shape"][-1] == width, "x does not fit"
    assert 1 <= r <= min(out, width), "r is out of range"
    value = {name: [Fraction(v) for v in unpack(t)] for name, t in inputs.items()}
    bias = value.get("bias", [Fraction(0)] * out)
    assert len(bias) == out, "bias does not fit"
    s = Fraction(alpha) / Fraction(math.sqrt(r) if rank_stabilized else r)
    y = []
    for start in range(0, len(value["x"]), width):
        x = value["x"][start : start + width]
        h = [dot(x, value["A"][k * width :]) for k in range(r)]
        for o in range(out):
            base = dot(x, value["W"][o * width :]) + bias[o]
            y.append(float(base + s * dot(h, value["B"][o * r :])))
    return {"y": tensor(y, [*inputs["x"]["shape"][:-1], out])}


def dot(a, b):
    return sum(p * q for p, q in zip(a, b, strict=False))


def answer(case):
    function = {"nf4_quantize": nf4_quantize, "lora_forward": lora_forward}.get(
        case["operation"]
    )
    if function is None:
        return {"unsupported": f"no {case['operation']} here"}
    try:
        return {"outputs": function(case["inputs"], **case["parameters"])}
    except AssertionError as reason:
        return {"refused": str(reason)}


if __name__ == "__main__":
    for line in sys.stdin:  # one case; with --persistent many
        request = json.loads(line)
        command = request.get("command", "run")
        if command == "stop":
            break
        said = {"ready": "plain"} if command == "start" else answer(request)
        number = {"id": request["id"]} if "id" in request else {}
        print(json.dumps({**number, **said}), flush=True)
