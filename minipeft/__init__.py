"""minipeft: parameter-efficient fine-tuning, written twice and proved equal.

reference/   NumPy: the definition of every method
torch/       the same names as modules and autograd, plus `inject`
cupy/        CUDA kernels, where memory layout is the point
golden/      vectors that check any other implementation
lab/         models, data, training, memory, plots
cli          the `minipeft` command
"""

__version__ = "0.1.0"
