"""What a device has room for."""

from __future__ import annotations

import torch


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that can be allocated: what is free, and what torch's cache holds of past tensors."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
