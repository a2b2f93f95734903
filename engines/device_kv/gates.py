"""What the engine thread has asked a device to compute, as something that another thread can wait for."""

from __future__ import annotations

import torch

Gate = torch.cuda.Event | None  # None: it is computed already, as on a CPU


def gate_of(device: torch.device) -> Gate:
    """Everything that this thread has asked `device` to compute so far."""
    if device.type != "cuda":
        return None
    event = blocking_event()
    event.record(torch.cuda.current_stream(device))
    return event


def wait_for(gate: Gate) -> None:
    """Until it is computed. The thread sleeps."""
    if gate is not None:
        gate.synchronize()


def blocking_event() -> torch.cuda.Event:
    """One that a thread sleeps on; without `blocking` it would spin."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
