"""This machine's devices, and the places of the catalogue's workers on them."""

from __future__ import annotations

from collections.abc import Sequence

from api.cli.console import stderr
from api.cli.fleet.placement import Place, place
from config.catalogue import ModelSpec
from config.devices import DeviceError, Machine, discover
from config.settings import SettingsError


def find_places(
    models: Sequence[ModelSpec], *, engine: str, cpu: bool = False, bind: bool = True
) -> list[Place]:
    """Where the workers of these models run here; `cpu` leaves the machine's devices alone.

    Raises `SettingsError` when its devices can't be used or don't suffice.
    """
    if engine == "simulated":
        # It computes nothing.
        return place(models, Machine(), bind=False)
    try:
        machine = discover(gpus=not cpu)
    except DeviceError as error:
        raise SettingsError(f"{error} (forebay workers start --cpu leaves devices alone)") from None
    for problem in machine.problems:
        stderr().print(f"left out: {problem}", markup=False, highlight=False)
    return place(models, machine, bind=bind)
