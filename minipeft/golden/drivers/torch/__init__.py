"""The torch column, on the device of the bridge."""

from minipeft.golden.drivers import need

need("torch", "'minipeft[torch]'")
