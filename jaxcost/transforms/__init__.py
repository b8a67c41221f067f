"""Pure functions from weights to weights, each picking its weights by path rules; see `base`."""

from jaxcost.transforms.base import (
    Calibration,
    CalibrationError,
    Chain,
    Covered,
    Rule,
    RuleError,
    Transform,
    chain,
    rule,
)
from jaxcost.transforms.calibration import CalibrationConfig, calibrate, calibrated
from jaxcost.transforms.factorize import factorize
from jaxcost.transforms.freeze import freeze
from jaxcost.transforms.lora import lora
from jaxcost.transforms.prune import prune
from jaxcost.transforms.quantize import quantize
from jaxcost.transforms.schedules import SET, Gradual, Iterative, RigL

__all__ = [
    "SET",
    "Calibration",
    "CalibrationConfig",
    "CalibrationError",
    "Chain",
    "Covered",
    "Gradual",
    "Iterative",
    "RigL",
    "Rule",
    "RuleError",
    "Transform",
    "calibrate",
    "calibrated",
    "chain",
    "factorize",
    "freeze",
    "lora",
    "prune",
    "quantize",
    "rule",
]
