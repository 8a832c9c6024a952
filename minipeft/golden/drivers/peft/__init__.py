"""peft through its public functions, on the CPU."""

from minipeft.golden.drivers import need

need("peft", "peft")
