"""What training keeps in memory: weights, gradients, optimizer states, activations.

    model = named("config.json")
    peak(model, (1, 512), Adapter(r=16)).total

All results are bytes. What is not counted: the allocator's fragments, the workspace of
a kernel, and what the driver takes.
"""

from minipeft.lab.memory.activations import activation_memory
from minipeft.lab.memory.configs import named, of_config, of_model
from minipeft.lab.memory.counted import (
    COUNTED_ADAPTER,
    COUNTED_TOKENS,
    ways_to_train,
)
from minipeft.lab.memory.rows import METHODS, Adapter, adapter_parameters
from minipeft.lab.memory.shapes import (
    ATTENTION,
    FEEDFORWARD,
    LINEARS,
    LLAMA_7B,
    Architecture,
)
from minipeft.lab.memory.training import (
    Memory,
    Peak,
    Precision,
    Step,
    peak,
    quantized_bits,
    training_memory,
)

__all__ = [
    "ATTENTION",
    "COUNTED_ADAPTER",
    "COUNTED_TOKENS",
    "FEEDFORWARD",
    "LINEARS",
    "LLAMA_7B",
    "METHODS",
    "Adapter",
    "Architecture",
    "Memory",
    "Peak",
    "Precision",
    "Step",
    "activation_memory",
    "adapter_parameters",
    "named",
    "of_config",
    "of_model",
    "peak",
    "quantized_bits",
    "training_memory",
    "ways_to_train",
]
