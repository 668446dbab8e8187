"""The temperature of a loss: held, learned and scheduled; swept over a range, fitted to held-out pairs, calibrated."""

from .alignment import alignment_temperature
from .calibration import Calibration, calibration
from .fitting import Fit, Verdict, fit
from .held_out import HeldOutTemperature
from .individual import IndividualTemperature
from .ranking import Bounds
from .schedules import CosineTemperature, TemperatureSchedule
from .sweep import Sweep, sweep

__all__ = [
    "Bounds",
    "Calibration",
    "CosineTemperature",
    "Fit",
    "HeldOutTemperature",
    "IndividualTemperature",
    "Sweep",
    "TemperatureSchedule",
    "Verdict",
    "alignment_temperature",
    "calibration",
    "fit",
    "sweep",
]
