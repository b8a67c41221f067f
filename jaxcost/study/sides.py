"""Both sides of each claim, with equal budgets: a function of a bench and a seed, of the name that the claim has.

Figures that are scores are bits per byte of held-out text, or the share of its labels that are wrong; those of layers
are ‖x·W - x·W'‖ / ‖x·W‖ on unseen inputs.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost import weights
from jaxcost.cost.hlo import compiled_cost
from jaxcost.study.bench import LAYER, Bench, Features, Trained, layer
from jaxcost.study.labels import Arm, run_labels
from jaxcost.study.relations import Sides
from jaxcost.training.distill import DistillConfig
from jaxcost.transforms import Gradual, RigL, chain, factorize, lora, merge_adapters, prune, quantize, rule, smooth
from jaxcost.transforms.base import BLOCK_KERNELS

# ---- Pruning ----


def magnitude_over_random(bench: Bench, seed: int) -> Sides:
    base = bench.base(seed).params
    return {
        method: bench.train(
            f"prune-80-{method}", seed, start=base, transforms=(prune(sparsity=0.8, method=method),)
        ).score
        for method in ("magnitude", "random")
    }


def gradual_over_one_shot(bench: Bench, seed: int) -> Sides:
    base, steps = bench.base(seed).params, bench.config.recovery_steps
    way = Gradual(end_step=steps * 6 // 10, every_steps=max(1, steps // 20))
    return {
        "gradual": bench.train(
            "prune-80-gradual", seed, start=base, transforms=(prune(sparsity=0.8, gradual=way),)
        ).score,
        "one shot": bench.train("prune-80-magnitude", seed, start=base, transforms=(prune(sparsity=0.8),)).score,
    }


def rigl_over_static(bench: Bench, seed: int) -> Sides:
    steps = bench.config.base_steps
    # A connection that has just grown must have time to become larger than those that are dropped next.
    ways = {"RigL": RigL(end_step=steps * 3 // 4, every_steps=max(1, steps // 8)), "static": None}
    random = prune(sparsity=0.9, method="random", budget="erk")
    return {
        name: bench.train(f"sparse-{name}", seed, transforms=(dataclasses.replace(random, regrow=way),)).score
        for name, way in ways.items()
    }


def movement_over_magnitude(bench: Bench, seed: int) -> Sides:
    base, steps = bench.base(seed).params, 2 * bench.config.recovery_steps
    way = Gradual(end_step=steps * 7 // 10, every_steps=max(1, steps // 50))
    return {
        method: bench.train(
            f"shifted-{method}",
            seed,
            start=base,
            transforms=(prune(sparsity=0.95, method=method, gradual=way),),
            steps=steps,
            shifted=True,
        ).score
        for method in ("movement", "magnitude")
    }


def pruned_layer(seed: int, features: Features) -> Sides:
    found = layer(seed, features)
    return {
        "SparseGPT": found.error(prune(rules=LAYER, method="sparsegpt")),
        "Wanda": found.error(prune(rules=LAYER, method="wanda")),
        "magnitude": found.error(prune(rules=LAYER, scope="output")),
    }


# ---- Augmentation ----


def augmentation(bench: Bench, seed: int, labels: int) -> Sides:
    ways = (Arm("augmented", labels, augment=True), Arm("as they are", labels))
    folder = bench.workdir / "runs" / f"{labels} labels"
    found = run_labels(bench.labels(), folder, ways, (seed,), quiet=True)
    return {row["arm"]: 1 - row["accuracy"] for row in found["rows"]}


# ---- Low rank ----


def whitened_over_plain(bench: Bench, seed: int) -> Sides:
    found = layer(seed, "outliers")
    return {
        "whitened": found.error(factorize(rules=LAYER, rank=24, whitened=True)),
        "plain": found.error(factorize(rules=LAYER, rank=24)),
    }


# ---- Adapters ----


RATES = {"full fine-tune": (2e-3, 4e-3, 8e-3, 1.6e-2), "LoRA": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}
"""Learning rates that are swept, as many for each side; a side is judged by its best."""


def _lora(**options) -> lora:
    # The embeddings have adapters too, and the norms train whole: the other text is another language.
    return lora(rules=(rule("(kernel|table)$"),), rank=4, train="norm", **options)


def _adapted(bench: Bench, seed: int, side: str) -> list[Trained]:
    base = bench.base(seed).params
    transforms = (_lora(),) if side == "LoRA" else ()
    return [
        bench.train(
            f"shifted-{side.replace(' ', '-')}-{rate:g}",
            seed,
            start=base,
            transforms=transforms,
            steps=2 * bench.config.recovery_steps,
            learning_rate=rate,
            shifted=True,
        )
        for rate in RATES[side]
    ]


def lora_near_full(bench: Bench, seed: int) -> Sides:
    return {side: min(run.score for run in _adapted(bench, seed, side)) for side in RATES}


def lora_holds_less(bench: Bench, seed: int) -> Sides:
    runs = {side: _adapted(bench, seed, side)[0] for side in RATES}
    return {side: float(run.fitted.cost.argument_bytes) for side, run in runs.items()}


def lora_computes_less(bench: Bench, seed: int) -> Sides:
    runs = {side: _adapted(bench, seed, side)[0] for side in RATES}
    return {side: float(run.fitted.cost.total_flops) for side, run in runs.items()}


def dora_over_lora(bench: Bench, seed: int) -> Sides:
    base = bench.base(seed).params
    return {
        name: bench.train(
            f"shifted-{name}-0.016",
            seed,
            start=base,
            transforms=(_lora(dora=name == "DoRA"),),
            steps=2 * bench.config.recovery_steps,
            learning_rate=1.6e-2,
            shifted=True,
        ).score
        for name in ("DoRA", "LoRA")
    }


# ---- Quantisation ----


def _rounded_layer(seed: int, correlation: float) -> Sides:
    found = layer(seed, "correlated", correlation=correlation)
    return {
        "GPTQ": found.error(quantize(rules=LAYER, bits=4, method="gptq")),
        "nearest": found.error(quantize(rules=LAYER, bits=4)),
    }


def gptq_over_nearest(bench: Bench, seed: int) -> Sides:
    return _rounded_layer(seed, 0.9)


def gptq_gains_with_correlation(bench: Bench, seed: int) -> Sides:
    both = {correlation: _rounded_layer(seed, correlation) for correlation in (0.9, 0.5, 0)}
    return {f"correlation {name}": sides["GPTQ"] / sides["nearest"] for name, sides in both.items()}


def smoothing_with_outliers(bench: Bench, seed: int) -> Sides:
    found, w8a8 = layer(seed, "outliers"), quantize(rules=LAYER, activations="dynamic")
    return {"smoothed": found.error(smooth(rules=LAYER), w8a8), "naive": found.error(w8a8)}


def smoothing_is_exact(bench: Bench, seed: int) -> Sides:
    found = layer(seed, "outliers")
    return {"smoothed": found.error(smooth(rules=LAYER)), "one in 100000": 1e-5}


def trained_quantised_over_rounded(bench: Bench, seed: int) -> Sides:
    base, int4 = bench.base(seed).params, quantize(bits=4)
    training = quantize(mode="training", bits=4, activations="none", backward_bits=None)
    return {
        "trained": bench.train("int4-trained", seed, start=base, transforms=(training,), finish=(int4,)).score,
        "rounded": bench.train("int4-rounded", seed, start=base, finish=(int4,)).score,
    }


def nf4_over_int4(bench: Bench, seed: int) -> Sides:
    dense = {"layer": {"kernel": jax.random.normal(jax.random.key(seed), (512, 512))}}
    ways = {
        "NF4": quantize(rules=LAYER, bits=4, numbers="nf", group=64),
        "int4": quantize(rules=LAYER, bits=4, group=64),
    }

    def error(way):
        stored = weights.materialize(way(dense)["layer"]["kernel"])
        return float(jnp.linalg.norm(stored - dense["layer"]["kernel"]) / jnp.linalg.norm(dense["layer"]["kernel"]))

    return {name: error(way) for name, way in ways.items()}


def int8_training_is_free(bench: Bench, seed: int) -> Sides:
    # The unembedding stays in bfloat16, as is usual; here, quantising it too costs another 1 %.
    training = quantize(rules=BLOCK_KERNELS, mode="training")
    return {"int8": bench.train("int8-training", seed, transforms=(training,)).score, "bf16": bench.base(seed).score}


# ---- Distillation ----


def teacher_over_none(bench: Bench, seed: int) -> Sides:
    teacher = bench.base(seed).params
    taught = DistillConfig(logits=1.0, labels=0.5, temperature=2.0)
    return {
        "taught": bench.train("student-taught", seed, num_layers=1, distill=taught, teacher=teacher).score,
        "alone": bench.train("student-alone", seed, num_layers=1).score,
    }


# ---- Order ----


def _update(seed: int, dtype) -> tuple[jax.Array, jax.Array]:
    """A weight, and an update of rank 8 of a hundredth of its size."""
    key_w, key_a, key_b = jax.random.split(jax.random.key(seed), 3)
    w = jax.random.normal(key_w, (512, 512)) * 512**-0.5
    delta = jax.random.normal(key_a, (512, 8)) @ jax.random.normal(key_b, (8, 512))
    return w.astype(dtype), delta * (0.01 * jnp.linalg.norm(w) / jnp.linalg.norm(delta))


def unmerging_changes_weights(bench: Bench, seed: int) -> Sides:
    w, delta = _update(seed, jnp.bfloat16)
    merged = (w + delta).astype(jnp.bfloat16)
    changed = float(jnp.mean((merged - delta).astype(jnp.bfloat16) != w))
    return {"never merged": 0.0, "merged and unmerged": changed}


def merging_into_nf4_loses_the_update(bench: Bench, seed: int) -> Sides:
    w, delta = _update(seed, jnp.float32)
    nf4 = quantize(rules=LAYER, bits=4, numbers="nf", group=64)
    base = weights.materialize(nf4({"layer": {"kernel": w}})["layer"]["kernel"])
    merged = weights.materialize(nf4({"layer": {"kernel": base + delta}})["layer"]["kernel"])
    kept = jnp.sum((merged - base) * delta) / jnp.sum(jnp.square(delta))
    return {"served unmerged": 0.0, "merged": float(1 - kept)}


def merging_ends_sparsity(bench: Bench, seed: int) -> Sides:
    w, delta = _update(seed, jnp.float32)
    sparse = chain(prune(rules=LAYER, pattern="2:4"), lora(rules=LAYER, rank=8))({"layer": {"kernel": w}})
    adapted = sparse["layer"]["kernel"]
    adapted = adapted.replace(b=jax.random.normal(jax.random.key(seed), adapted.b.shape))
    masked = merge_adapters(lossy=True)({"layer": {"kernel": adapted}})["layer"]["kernel"]
    return {name: _density(w) for name, w in (("masked", masked), ("merged whole", adapted))}


def gptq_keeps_masks(bench: Bench, seed: int) -> Sides:
    found, gptq = layer(seed, "correlated"), quantize(rules=LAYER, method="gptq")
    pruned = found.changed(prune(rules=LAYER, pattern="2:4"))
    # The same zeros without their mask are what a GPTQ sees that is not told of them.
    blind = dataclasses.replace(found, kernel=weights.materialize(pruned))
    sides = {
        "told of the mask": found.changed(prune(rules=LAYER, pattern="2:4"), gptq),
        "not told": blind.changed(gptq),
    }
    return {name: _density(jnp.where(pruned.mask, 0, weights.materialize(w))) * 2 for name, w in sides.items()}


def bisection_over_sorting(bench: Bench, seed: int) -> Sides:
    devices = jax.devices()[:2]
    if len(devices) < 2:
        raise ValueError("A sharded matrix needs two devices; set XLA_FLAGS=--xla_force_host_platform_device_count=2.")
    place = NamedSharding(Mesh(np.asarray(devices), ("fsdp",)), PartitionSpec("fsdp", None))
    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=place)
    ways = {
        "bisection": lambda w: prune(rules=LAYER)({"layer": {"kernel": w}})["layer"]["kernel"].mask,
        "sorting": lambda w: jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[w.size // 2],
    }
    return {
        name: float(compiled_cost(jax.jit(way, out_shardings=place).lower(w).compile()).collective_bytes)
        for name, way in ways.items()
    }


def _density(w) -> float:
    return float(jnp.mean(weights.materialize(w) != 0))
