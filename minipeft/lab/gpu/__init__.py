"""`minipeft gpu-report`: what the kernels do on a real GPU.

launches   the launches of a kernel, noted while a launcher makes them
trials     every kernel with inputs whose result is known to the byte
device     where calls are timed: CuPy's events on a GPU
peers      bitsandbytes' kernels on the same tensors
examination  one kernel checked and timed, in a process of its own
slots      what a kernel's instructions cost, from its machine code
report     all of them, compared with what the device can do; Markdown and JSON
"""
