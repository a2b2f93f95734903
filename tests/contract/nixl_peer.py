"""The receiving process of the tests of NIXL between the memories of two devices.

    python -m tests.contract.nixl_peer <device> <bytes>
Prints its agent's metadata and its memory's address; for each line that comes in, a sum over its bytes by place.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from kvstore.transport.rdma import load_nixl
from kvstore.transport.rdma_agent import THREAD_NAP_US


class DeviceMemory:
    """Bytes on a device, registered with an agent of their own, for NIXL to write from and into."""

    def __init__(self, name: str, device: str, num_bytes: int) -> None:
        self.nixl: Any = load_nixl()
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        self.kind = self.nixl.DRAM_SEG if device == "cpu" else self.nixl.VRAM_SEG
        config = self.nixl.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, THREAD_NAP_US  # else nobody answers the writer
        self.agent = self.nixl.nixlAgent(name, config)
        self.backends = [self.agent.createBackend("UCX", {"ucx_error_handling_mode": "peer"})]
        memory = self.nixl.nixlRegDList(self.kind, [(self.bytes.data_ptr(), num_bytes, 0, "")])
        self.agent.registerMem(memory, self.backends)

    def sum_by_place(self) -> int:
        """Tells every byte and its place."""
        places = torch.arange(1, len(self.bytes) + 1, device=self.bytes.device)
        return int((self.bytes.long() * places).sum())


def main() -> None:
    device, num_bytes = sys.argv[1], int(sys.argv[2])
    memory = DeviceMemory("receiver", device, num_bytes)
    print(bytes(memory.agent.getLocalMD()).hex(), memory.bytes.data_ptr(), flush=True)
    for _ in sys.stdin:
        print(memory.sum_by_place(), flush=True)
    os._exit(0)  # NIXL may crash at the end of an interpreter


if __name__ == "__main__":
    main()
