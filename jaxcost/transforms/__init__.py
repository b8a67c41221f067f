"""Pure functions from weights to weights, each picking its weights by path rules; see `base`."""

from jaxcost.transforms.additions import bottleneck, prefix_tuning, prompt_tuning
from jaxcost.transforms.base import (
    Calibration,
    CalibrationError,
    Chain,
    Covered,
    OrderError,
    Rule,
    RuleError,
    Transform,
    chain,
    rule,
)
from jaxcost.transforms.calibration import CalibrationConfig, calibrate, calibrated
from jaxcost.transforms.factorize import allocate_ranks, factorize
from jaxcost.transforms.freeze import bias_only, freeze, norm_only
from jaxcost.transforms.ia3 import ia3
from jaxcost.transforms.lora import lora
from jaxcost.transforms.manifest import BrokenError
from jaxcost.transforms.merge import merge_adapters, merge_losses
from jaxcost.transforms.prune import prune
from jaxcost.transforms.quantize import quantize
from jaxcost.transforms.schedules import SET, Gradual, Iterative, RigL
from jaxcost.transforms.shrink import shrink
from jaxcost.transforms.smooth import smooth

__all__ = [
    "SET",
    "BrokenError",
    "Calibration",
    "CalibrationConfig",
    "CalibrationError",
    "Chain",
    "Covered",
    "Gradual",
    "Iterative",
    "OrderError",
    "RigL",
    "Rule",
    "RuleError",
    "Transform",
    "allocate_ranks",
    "bias_only",
    "bottleneck",
    "calibrate",
    "calibrated",
    "chain",
    "factorize",
    "freeze",
    "ia3",
    "lora",
    "merge_adapters",
    "merge_losses",
    "norm_only",
    "prefix_tuning",
    "prompt_tuning",
    "prune",
    "quantize",
    "rule",
    "shrink",
    "smooth",
]
