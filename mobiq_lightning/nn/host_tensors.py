"""The tensors of a module as they are on the host, to which it returns from a device."""

from __future__ import annotations

from torch import nn


class HostTensors:
    """What a module holds now, to be put back when it comes from a device, or from another dtype.

    Frozen weights do not change there. Their copies on the device can therefore be dropped, and what the host holds stays what it
    was: most of all pages of the file that the model was read from, which a copy back would turn into memory of the process.

    Args:
        module: A module whose tensors nobody changes until they are put back.
    """

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self._parameters = [(m, n, p, p.data) for m in modules for n, p in m._parameters.items() if p is not None]
        self._buffers = [(m, n, buffer) for m in modules for n, buffer in m._buffers.items() if buffer is not None]

    def put_back(self) -> None:
        """Gives the module the tensors that it had."""
        for module, name, parameter, data in self._parameters:
            parameter.data = data
            module._parameters[name] = parameter
        for module, name, buffer in self._buffers:
            module._buffers[name] = buffer
