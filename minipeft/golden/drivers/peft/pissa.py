"""PiSSA in peft: `init_lora_weights="pissa"`, a full singular value decomposition."""

from peft import LoraConfig

from minipeft.golden.drivers.bridge import to_numpy
from minipeft.golden.drivers.peft.layers import TARGET, adapted, layer_of
from minipeft.golden.tensors import Array


def pissa_init(W: Array, r: int, alpha: float) -> tuple[Array, Array]:
    """Return what is left of W, and the first update."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, init_lora_weights="pissa", target_modules=TARGET
    )
    layer = layer_of(adapted(W, None, config))
    return to_numpy(layer.base_layer.weight), to_numpy(
        layer.get_delta_weight("default")
    )
