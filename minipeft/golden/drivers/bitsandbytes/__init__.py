"""bitsandbytes through its public functions, on the CPU.

Its rules are its own: what differs from the vectors shows as a failure, with the flag.
"""

from minipeft.golden.drivers import need

need("bitsandbytes", "bitsandbytes")
