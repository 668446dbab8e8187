"""The temperature of a loss: held, learned and scheduled; swept over a range, fitted to held-out pairs, calibrated."""

from .alignment import alignment_temperature
from .calibration import Calibration, calibration
from .diagnosis import Diagnosis, diagnose, diagnose_step
from .fitting import Fit, Verdict, fit
from .held_out import HeldOutTemperature
from .individual import IndividualTemperature
from .ranking import Bounds
from .rules import Warned
from .schedules import CosineTemperature, TemperatureSchedule
from .starting import starting_temperature
from .sweep import Sweep, sweep

__all__ = [
    "Bounds",
    "Calibration",
    "CosineTemperature",
    "Diagnosis",
    "Fit",
    "HeldOutTemperature",
    "IndividualTemperature",
    "Sweep",
    "TemperatureSchedule",
    "Verdict",
    "Warned",
    "alignment_temperature",
    "calibration",
    "diagnose",
    "diagnose_step",
    "fit",
    "starting_temperature",
    "sweep",
]
