"""The torch column, on the CPU."""

from minipeft.golden.drivers import need

need("torch", "'minipeft[torch]'")
