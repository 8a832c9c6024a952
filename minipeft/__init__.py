"""minipeft: parameter-efficient fine-tuning, written twice and compared bit by bit.

reference/   NumPy: the definition of every method
torch/       the same names as modules and autograd, plus `inject`
cupy/        the kernels over CuPy arrays, for methods that depend on memory layout
kernels/     CUDA sources; how they are compiled, launched and checked
golden/      vectors that check any other implementation
lab/         models, data, training, memory, plots
cli          the `minipeft` command
"""

__version__ = "0.1.0"
