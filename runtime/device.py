"""This machine → the GPU an engine would run on.

What the loader of engines asks about the machine's GPU it asks here, so that tests can answer in its place.
"""

from mistral_trt.devices import Device, local_devices
from mistral_trt.errors import EngineMismatchError


def local_device() -> Device | None:
    """The GPU that CUDA gives a program first; None where it sees none.

    Raises EngineMismatchError where nothing but CUDA knows which one that is.
    """
    found = local_devices()
    if found.uncertain:
        raise EngineMismatchError(found.uncertain)
    return found.devices[0] if found.devices else None
