"""CUDA kernels over CuPy arrays, under the reference's names.

executor     where they run: CuPy on a device; in the tests, a CPU
managed      memory that the device and the host both reach

The kernels themselves are in `minipeft.kernels`.

Importing this package needs no GPU and no CuPy. Using it without them raises one
sentence that says what is missing.
"""
