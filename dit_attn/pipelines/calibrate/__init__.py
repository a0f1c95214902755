"""Calibrate densities by layer and part of the run at equal cost."""

from dit_attn.pipelines.calibrate.calibration import Calibration, calibrate
from dit_attn.pipelines.calibrate.sensitivity import CalibrationPlan, make_plan

__all__ = ["Calibration", "CalibrationPlan", "calibrate", "make_plan"]
