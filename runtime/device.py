"""This machine → the GPU an engine would run on.

What the loader of engines asks about the machine's GPU it asks here, so that tests can answer in its place.
"""

from mistral_trt.devices import Device, local_devices


def local_device() -> Device | None:
    """The first GPU of this machine, as nvidia-smi tells of it; None without a GPU or a working driver."""
    devices = local_devices().devices
    return devices[0] if devices else None
