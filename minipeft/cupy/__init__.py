"""CUDA kernels over CuPy arrays, under the reference's names.

executor     runs the kernels: with CuPy on a GPU; in the tests on a CPU
managed      memory that both the device and the host can access

The kernels themselves are in `minipeft.kernels`.

Importing this package needs no GPU and no CuPy. Using it without them raises an
error that names what is missing.
"""
