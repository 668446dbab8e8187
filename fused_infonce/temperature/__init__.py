"""The temperature of a loss, held and learned; swept over a range, fitted to held-out pairs, and calibrated."""

from .calibration import Calibration, calibration
from .diagnosis import Diagnosis, diagnose, diagnose_step
from .fitting import Fit, Verdict, fit
from .held_out import HeldOutTemperature
from .ranking import Bounds
from .rules import Warned
from .starting import starting_temperature
from .sweep import Sweep, sweep

__all__ = [
    "Bounds", "Calibration", "Diagnosis", "Fit", "HeldOutTemperature", "Sweep", "Verdict", "Warned", "calibration",
    "diagnose", "diagnose_step", "fit", "starting_temperature", "sweep",
]  # fmt: skip
