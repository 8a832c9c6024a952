"""torchao's NF4Tensor, on the CPU.

It always quantizes the scales again, in a format of its own. What can be compared is
the first level: its codes, the scales that they were made with, and what its codes and
given scales decode to.
"""

from minipeft.golden.drivers import need

need("torchao", "torchao")
