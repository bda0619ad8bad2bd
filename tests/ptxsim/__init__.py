"""ptxsim: run nvcc-generated PTX on the CPU, with memory, race and barrier checks."""

from .codegen import UnsupportedInstruction
from .device import Device, LaunchRecord
from .host import HostProgram
from .module import DeviceError, LaunchResult, Module, Out, from_bf16, to_bf16
from .parser import ParseError
from .profile import Profile

__all__ = [
    "Module",
    "Device",
    "HostProgram",
    "DeviceError",
    "LaunchResult",
    "LaunchRecord",
    "Profile",
    "Out",
    "to_bf16",
    "from_bf16",
    "UnsupportedInstruction",
    "ParseError",
]
