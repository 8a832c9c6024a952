"""Every method again, as modules and autograd: the same files and names, any device.

Each parametrization is one `nn.Module` that wraps a frozen layer; `inject` wraps the
layers of a whole model.
"""
