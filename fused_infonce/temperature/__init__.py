"""The temperature of a loss, held and learned; swept over a range, fitted to held-out pairs, and calibrated."""

from .calibration import Calibration, calibration
from .fitting import Fit, Verdict, fit
from .ranking import Bounds
from .sweep import Sweep, sweep

__all__ = ["Bounds", "Calibration", "Fit", "Sweep", "Verdict", "calibration", "fit", "sweep"]
