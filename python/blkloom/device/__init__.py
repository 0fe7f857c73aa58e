"""Devices: their life, the thread that answers their faults, and the ways Python code uses them."""

from blkloom.device.async_device import AsyncDevice
from blkloom.device.device import Device
from blkloom.device.open_device import open
from blkloom.device.raw_io import RawDevice

__all__ = ["AsyncDevice", "Device", "RawDevice", "open"]
