"""The temperature of a loss, held and learned; swept over a range, fitted to held-out pairs, and calibrated."""

from .calibration import Calibration, calibration
from .fitting import Fit, Verdict, fit
from .held_out import HeldOutTemperature
from .ranking import Bounds
from .sweep import Sweep, sweep

__all__ = ["Bounds", "Calibration", "Fit", "HeldOutTemperature", "Sweep", "Verdict", "calibration", "fit", "sweep"]
