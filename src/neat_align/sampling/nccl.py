"""NCCL's own C functions, as far as they send tensors to processes of another program.

torch.distributed makes groups of its own processes alone; vLLM's weight-transfer engine takes any
process that has NCCL's unique id of the group. The library is the one that torch has loaded: NCCL
refuses a peer of another version. **Unchecked on GPUs**: no machine of ours has one. Without one
the real library is asked for its version and a unique id, and says what it lacks.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch

from neat_align.errors import SamplerError

_LIBRARY = "libnccl.so.2"
_ID_BYTES = 128
# nccl.h, ncclDataType_t.
TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
_SUM = 0


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _ID_BYTES),)


class Nccl:
    """The library. Every method raises SamplerError with what NCCL says."""

    def __init__(self, library: str = _LIBRARY) -> None:
        try:
            self.c: Any = ctypes.CDLL(library)
        except OSError as error:
            raise SamplerError(
                f"NCCL cannot be loaded ({error}): it comes with torch's builds for CUDA on Linux. "
                "Install one, or set vllm_sync_backend: folder"
            ) from error
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.c.ncclCommInitRank.argtypes = [ctypes.POINTER(pointer), number, _UniqueId, number]
        # Send, receive, count, type, operation or root, communicator, stream.
        sending: list[Any] = [pointer, pointer, ctypes.c_size_t, number, number, pointer, pointer]
        self.c.ncclAllReduce.argtypes = self.c.ncclBroadcast.argtypes = sending
        self.c.ncclCommAbort.argtypes = self.c.ncclGetLastError.argtypes = [pointer]
        self.c.ncclGetErrorString.restype = self.c.ncclGetLastError.restype = ctypes.c_char_p

    def version(self) -> int:
        """Such as 22707 for 2.27.7."""
        number = ctypes.c_int()
        self.check(self.c.ncclGetVersion(ctypes.byref(number)))
        return number.value

    def unique_id(self) -> bytes:
        """By which the members of a group find each other: 128 bytes."""
        made = _UniqueId()
        self.check(self.c.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def join(self, unique_id: bytes, members: int, device: torch.device) -> NcclGroup:
        """Be rank 0 of a group, on this GPU. Waits until all members are there."""
        communicator = ctypes.c_void_p()
        made = _UniqueId.from_buffer_copy(unique_id)
        with _on(device):
            self.check(self.c.ncclCommInitRank(ctypes.byref(communicator), members, made, 0))
        return NcclGroup(self, communicator, device)

    def check(self, status: int) -> None:
        """Raise for a status that is not success."""
        if status != 0:
            what = self.c.ncclGetErrorString(status).decode()
            last = (self.c.ncclGetLastError(None) or b"").decode()
            raise SamplerError(f"NCCL says: {what}{f' ({last})' if last else ''}")


@dataclass(frozen=True)
class NcclGroup:
    """A group of which this process is rank 0, and sends from one GPU.

    A method returns when the GPU has done it, which takes all members.
    """

    nccl: Nccl
    communicator: ctypes.c_void_p
    device: torch.device

    def warm_up(self) -> None:
        """The sum of one number over all members: what vLLM's processes do when they join."""
        self._run(self.nccl.c.ncclAllReduce, torch.zeros(1, device=self.device), _SUM)

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Send a tensor on this GPU, of one of TYPES, to all members."""
        self._run(self.nccl.c.ncclBroadcast, tensor.contiguous(), 0)

    def _run(self, call: Any, tensor: torch.Tensor, number: int) -> None:
        at, size, kind = tensor.data_ptr(), tensor.numel(), TYPES[tensor.dtype]
        with _on(self.device):
            stream = torch.cuda.current_stream()
            status = call(at, at, size, kind, number, self.communicator, stream.cuda_stream)
            self.nccl.check(status)
            stream.synchronize()

    def abort(self) -> None:
        """Give up: what is under way ends with an error, here and on the members."""
        self.nccl.c.ncclCommAbort(self.communicator)


def _on(device: torch.device) -> Any:
    """This thread's GPU, while it is open."""
    return torch.cuda.device(device)
