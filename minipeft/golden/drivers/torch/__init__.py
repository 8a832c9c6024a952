"""The torch column, on the device of the bridge."""

from minipeft.errors import IN_CLONE
from minipeft.golden.drivers import need

need("torch", IN_CLONE.format("torch"))
