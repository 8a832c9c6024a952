"""CUDA kernels where memory layout is the point, under the reference's names.

kernels/     one .cu file a row, and the table of their templates and arguments
compiler     their machine code, from NVRTC
executor     where they run: CuPy on a device; in the tests, a CPU

Importing this package needs no GPU and no CuPy. Using it without them raises one
sentence that says what is missing.
"""
