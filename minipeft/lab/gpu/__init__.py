"""`minipeft gpu-report`: check and time the kernels on a real GPU.

launches   records the launches that a launcher makes
trials     every kernel with inputs whose result is known in every byte
device     times calls, with CuPy's events on a GPU
peers      bitsandbytes' kernels on the same tensors
examination  one kernel checked and timed, in a process of its own
slots      the cost of a kernel's instructions, from its machine code
gpu_report all kernels, compared with the limits of the device; Markdown and JSON
"""
