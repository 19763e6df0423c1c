"""Random states: seeding, and saving and restoring them for exact resume."""

import torch


def seed_everything(seed: int) -> None:
    """Seed torch on all devices: weights and stochastic losses draw from nothing else (data have
    own generators).
    """
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Torch's random states as tensors; weight initialisation and stochastic losses draw from no
    other.
    """
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(states: list[dict], rank: int = 0) -> None:
    """Restore what `rng_state` returned in the process `rank`, of the list of all processes.

    A process that is not in the list keeps its state; a different number of GPUs keeps that of the
    GPUs.
    """
    if rank >= len(states):
        return
    state = states[rank]
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
