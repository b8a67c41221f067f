"""Studies made up for tests of what is shown of them: a search that found harm, and a grid, of any number of rows."""

from typing import Any

from jaxcost import serialization
from jaxcost.config import Experiment
from jaxcost.study.recipes import Recipe, StudyConfig
from jaxcost.study.trials import FIGURES
from jaxcost.transforms import prune

HOSTILE = "</script><script>window.harmed = true</script><img src=x onerror='window.harmed = true'>"
"""What a data example or an error may hold."""

USD_PER_SECOND = 0.1 / 3600
_PARTS = {
    "data": 0.0,
    "base": 100_000.0,
    "control": 1_234.5,
    "search": 34_567.8,
    "finalists": 2_469.1,
    "verification": 77.7,
}


def interval(*values: float) -> dict[str, Any]:
    return {"mean": sum(values) / len(values), "low": min(values), "high": max(values), "values": list(values)}


def row(index: int, **changes: Any) -> dict[str, Any]:
    """The control for 0, else something that is cheaper and worse the higher the index."""
    cut, score = 1 / (1 + index), 2.0 + 0.01 * index
    made = {
        "name": f"cut_{index}" if index else "control",
        "description": f"prune {index}% of A & B_{index}" if index else "none",
        "transforms": [f"prune(sparsity=0.{index})"] if index else [],
        "task": "base",
        "control": not index,
        "distill": None,
        "objective": "next_token",
        "metric": "bits per byte, python_text/library validation",
        "score": score,
        "score_before_recovery": score + 0.1,
        "control_score": 2.0,
        "score_interval": interval(score, score + 0.004, score - 0.002) if index < 2 else None,
        "trainable_parameters": 3_700_000,
        "checkpoint_bytes": int(13_600_000 * cut),
        "weight_bytes": 15_000_000,
        "step_flops": 46.7e9,
        "step_peak_bytes": 300_000_000,
        # The odd ones are slow: on another axis, other recipes are on the front.
        "step_seconds": 0.2 + 0.1 * (index % 2) - 0.0001 * index,
        "inference_flops_per_token": 7.0e6 * cut,
        "decode_tokens_per_second": 4000.0,
        "decode_seconds_per_token": 0.002,
        "usd_per_million_tokens": 0.007 * cut,
        "kwh_per_million_tokens": None,
        "recovery_steps": 32,
        "recovery_learning_rate": 3e-4,
        "usd": 0.00017,
        "hours": 0.0017,
        "flops": 1.5e12,
        "kwh": 2e-5,
        "kg_co2": 1e-5,
        "figures": FIGURES,
        "recovery": f"recovery{index}",
        "recovery_totals": {"seconds": 10.0, "tokens": 65_536, "flops": 1.5e12, "bytes": 0},
        "scoring_seconds": 2.0,
        "pareto": not index % 2,
        "pareto_on": ["checkpoint_bytes", "inference_flops_per_token"],
    }
    return made | changes


def _slice(by: str, name: str, loss: float, harmed: bool = False) -> dict[str, Any]:
    return {
        "by": by,
        "name": name,
        "count": 3_000,
        "examples": 200,
        "control_loss": 2.4,
        "loss": loss,
        "difference": loss - 2.4,
        "low": loss - 2.45,
        "high": loss - 2.35,
        "control_accuracy": 0.55,
        "accuracy": 0.2 if harmed else 0.54,
        "p_value": 0.0005 if harmed else 0.6,
        "harmed": harmed,
    }


def _exemplar(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "text": f"def f(x):\n    return {HOSTILE}",
        "group": "south",
        "label": None,
        "control_loss": 2.0,
        "loss": 4.0 - 0.2 * index,
        "difference": 2.0 - 0.2 * index,
        "control_said": " self",
        "said": " the",
        "expected": " self",
    }


def _bin(low: float) -> dict[str, float]:
    found = {"low": low, "high": low + 0.5}
    for who, right in (("control_", 0.01), ("", 0.05)):
        found |= {f"{who}count": 100, f"{who}confidence": low + 0.2, f"{who}accuracy": low + 0.2 - right}
    return found


def verification() -> dict[str, Any]:
    return {
        "recipe": "cut_1",
        "control": "control",
        "test": {
            "examples": 256,
            "unit": "a window of 256 tokens",
            "control_loss": 2.41,
            "loss": 2.43,
            "difference": 0.02,
            "low": 0.012,
            "high": 0.028,
            "p_value": 0.0002,
            "verdict": "worse",
        },
        "slices": [_slice("length", "shortest third", 2.41), _slice("dialect", "south", 3.9, harmed=True)],
        "exemplars": [_exemplar(index) for index in range(3)],
        "calibration": {"control_ece": 0.02, "ece": 0.05, "bins": [_bin(0.0), _bin(0.5)]},
        "fairness": [
            {
                "by": "dialect",
                "control_worst_group": "south",
                "control_worst_accuracy": 0.5,
                "worst_group": "south",
                "worst_accuracy": 0.2,
                "control_gap": 0.05,
                "gap": 0.34,
                "control_loss_gap": 0.2,
                "loss_gap": 1.49,
            }
        ],
        "safety": [
            {
                "name": "words of the lexicon",
                "kind": "lexicon",
                "prompts": 8,
                "control_hits": 0,
                "hits": 1,
                "worse": True,
                "examples": [{"prompt": "People are", "control": "kind", "text": HOSTILE}],
            }
        ],
        "safety_why_not": None,
        "seconds": 77.7,
        "why_not": None,
    }


def _trial(index: int) -> dict[str, Any]:
    stages = [
        {
            "steps": steps,
            "seed": 0,
            "score": 2.0 + 0.01 * index + 0.3 / steps,
            "estimated_usd": 1e-5 * steps,
            "usd": 1.1e-5 * steps,
            "estimated_seconds": 0.2 * steps,
            "seconds": 0.22 * steps,
            "estimated_flops": 4e10 * steps,
            "flops": 4e10 * steps,
        }
        for steps in ((8, 16, 32) if index < 3 else (8,) if index == 3 else ())
    ]
    statuses = ("finalist", "finalist", "finished", "stopped", "failed", "unaffordable")
    whys = {3: "worse than others at 8 steps.", 4: f"NonFiniteError: {HOSTILE}", 5: "0.2 USD were not there."}
    return {
        "name": row(index)["name"],
        "description": row(index)["description"],
        "transforms": row(index)["transforms"],
        "control": not index,
        "status": statuses[index],
        "why": whys.get(index),
        "predicted_score": None if index < 2 else 2.05,
        "predicted_error": None if index < 2 else 0.02,
        "stages": stages,
        "estimated_usd": 0.0003,
        "estimated_seconds": 11.0,
        "estimated_flops": 1.4e12,
        "weight_bytes": 15_000_000,
    }


def _part(stage: str, seconds: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "seconds": seconds,
        "tokens": int(seconds * 1000),
        "flops": seconds * 1e11,
        "usd": seconds * USD_PER_SECOND,
        "kwh": seconds * 1e-5,
        "estimated_seconds": seconds * 0.9,
        "estimated_usd": seconds * 0.9 * USD_PER_SECOND,
        "estimated_kwh": None,
    }


def study(rows: int = 4, **changes: Any) -> dict[str, Any]:
    """A search whose answer harms a group; `rows` recipes were run to the end, the control among them."""
    recipes = tuple(Recipe(f"cut_{index}", transforms=(prune(sparsity=0.5),)) for index in range(1, rows))
    seconds = sum(_PARTS.values())
    ledger = [_part(stage, took) for stage, took in _PARTS.items()]
    finalists = [row(index) for index in range(min(2, rows))]
    made = {
        "schema": "jaxcost-study-2",
        "kind": "search",
        "experiment": serialization.to_json(Experiment(study=StudyConfig(recipes=recipes, decode_tokens=50))),
        "machine": {
            "platform": "cpu",
            "device": "cpu",
            "devices": 1,
            "cpus": 2,
            "priced_as": "a machine of 2 cores",
            "jax": "0.10.2",
        },
        "data": {"name": "python_text/library", "shifted": "python_text/reference"},
        "base": {"steps": 420, "step_seconds": 0.18, "metrics": {"bits_per_byte": 2.002}},
        "baselines": {"unigram": 4.7, "trigram": 2.7, "five_gram": 1.9},
        "estimates": {
            "parameters": 3_700_000,
            "training_flops_per_token": 2e7,
            "training_flops": 2e13,
            "memory_bytes": {"weights_bytes": 1.5e7},
        },
        "plan": {
            "topology": "v5e:2x2",
            "peak_bytes": None,
            "usable_bytes": None,
            "fits": None,
            "step_flops": None,
            "lower_bound_seconds": None,
            "limit": None,
            "why": "There is no compiler for it here.",
        },
        "prices": {"usd_per_chip_hour": {"value": 0.1, "source": "a price list", "date": "2026-10"}},
        "answer": {
            "recipe": "cut_1",
            "score": 2.01,
            "score_interval": row(1)["score_interval"],
            "control_score": 2.0,
            "cost_shares": {"checkpoint_bytes": 0.5},
            "text": "cut_1 needs 2.010 bits per byte where the control needs 2.000, with half of its bytes on disk.",
            "flagged": True,
        },
        "flags": [
            {
                "kind": "slice",
                "by": "dialect",
                "name": "south",
                "text": "dialect south: 3.900 nats where the control needs 2.400.",
            }
        ],
        "budget": [
            {"name": "a quarter", "of": "study", "metric": "usd", "limit": 4.0, "used": 3.85, "why": None},
            {
                "name": "half the bytes",
                "of": "recipe",
                "metric": "checkpoint_bytes",
                "limit": 6.8e6,
                "used": 6.8e6,
                "why": None,
            },
        ],
        "rows": [row(index) for index in range(rows)],
        "winners": [],
        "findings": [{"claim": "base_beats_trigram", "holds": True, "text": "The base model beats the trigram."}],
        "trials": [_trial(index) for index in range(6)],
        "finalists": [
            {"name": one["name"], "control": one["control"], "seeds": [0, 1, 2], "score": one["score_interval"]}
            for one in finalists
        ],
        "surrogate": {"trials": 4, "rank_correlation": 0.7},
        "verification": verification(),
        "ledger": ledger,
        "serving": [
            {"recipe": "cut_1", "usd_per_million_tokens": 0.0035, "kwh_per_million_tokens": None},
            {"recipe": "control", "usd_per_million_tokens": 0.007, "kwh_per_million_tokens": None},
        ],
        "totals": {
            "seconds": seconds,
            "tokens": sum(part["tokens"] for part in ledger),
            "flops": seconds * 1e11,
            "bytes": 0,
            "usd": seconds * USD_PER_SECOND,
            "kwh": seconds * 1e-5,
            "estimated_usd": 0.9 * seconds * USD_PER_SECOND,
            "estimated_seconds": 0.9 * seconds,
            "estimated_flops": 0.9 * seconds * 1e11,
        },
    }
    return made | changes


def grid(rows: int = 3) -> dict[str, Any]:
    """What the schema before searches wrote of a list of recipes."""
    added = ("kind", "answer", "flags", "budget", "trials", "finalists", "surrogate", "verification", "ledger")
    made = {key: value for key, value in study(rows).items() if key not in (*added, "serving")}
    winner = {"budget": "any price", "metric": "usd", "limit": 1.0, "recipe": "control", "score": 2.0}
    totals = {key: value for key, value in made["totals"].items() if not key.startswith("estimated")}
    return made | {"schema": "jaxcost-study-1", "winners": [winner], "totals": totals}
