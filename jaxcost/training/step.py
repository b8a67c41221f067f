"""One step of training as a pure function of state and batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from jaxcost import weights
from jaxcost.evaluation.batch import Batch, beside_inputs
from jaxcost.evaluation.detection import detection_loss
from jaxcost.evaluation.losses import cross_entropy, ctc_loss, shared_cross_entropy, squared_error
from jaxcost.models.experts import LOSSES
from jaxcost.models.transformer import BOXES, FOUND, Transformer, output_of
from jaxcost.sharding import constrain, microbatches
from jaxcost.training.distill import Distiller
from jaxcost.transforms import Transform


@struct.dataclass
class TrainState:
    """All that a step reads and writes, and all that a checkpoint must hold of it."""

    step: jax.Array
    """int32 scalar: steps done."""
    params: weights.Params
    """The weights, of any kinds."""
    optimizer: Any
    """The optimizer's state, over the arrays that train."""
    key: jax.Array
    """uint32 key data; a step's key is this one folded with its number."""
    beside: dict[str, jax.Array] = struct.field(default_factory=dict)
    """What trains beside the weights and ends with the run, by name."""


def init_state(
    params: weights.Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    beside: dict[str, jax.Array] | None = None,
) -> TrainState:
    """The state before the first step."""
    beside = beside or {}
    trainable, _ = weights.partition(params)
    if not trainable:
        raise ValueError("Nothing in the weights trains; quantised and frozen ones need an adapter (lora) to train.")
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable | beside), key, beside)


def make_train_step(
    model: Transformer,
    optimizer: optax.GradientTransformation,
    transform: Transform,
    *,
    accumulation: int = 1,
    loss_chunks: int = 1,
    router_losses: Mapping[str, float] = MappingProxyType({}),
    distiller: Distiller | None = None,
    ctc_blank: int | None = None,
    offload: bool = False,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """A function (state, batch) → (state, metrics) to jit; metrics are float32 scalars `loss`, `gradient_norm` and
    `skipped`, 1 for a step whose loss or gradient is not finite, which changes nothing but the count of steps.

    `loss` is the mean negative log-likelihood in nats a token over the whole batch, the mean squared error where
    targets are float32, or that of `detection_loss` where the head has boxes, in which a microbatch counts by its
    objects. Only the arrays that train are differentiated. After the update, `transform.update` moves what moves while
    training (masks). With experts, their router's losses are metrics too, and what is trained on is the loss plus each
    of them times its weight in `router_losses`.

    With a distiller, its objective takes the loss's place in what is minimised, and where its teacher is online the
    function takes the teacher's weights as a third argument. With the id of a blank, the loss is that of CTC, in nats a
    label. With `offload`, the optimizer's state comes from host memory; where it goes, the caller's shardings say.
    """
    if distiller is not None and ctc_blank is not None:
        raise ValueError("A distiller compares tokens one by one, which CTC does not; leave out either.")
    if ctc_blank is not None and model.config.head.pooling != "none":
        raise ValueError("CTC takes an answer for each frame; set model.head.pooling to 'none'.")
    if model.config.head.boxes and not (distiller is ctc_blank is None):
        raise ValueError(
            "model.head.boxes is on, which is learned by the loss of a set; leave out the teacher and CTC."
        )

    def loss_sums(trainable, frozen, structure, batch, key, teacher):
        if model.execution.gradients != "float32":
            # The cast's own transpose turns the gradient back, after it was summed over the devices.
            trainable = {name: a.astype(model.execution.gradients) for name, a in trainable.items()}
        params = weights.combine(structure, trainable, frozen)
        model_key, head_key = jax.random.split(key)
        kept = ("losses", FOUND, *(distiller.watched if distiller else ()))
        (hidden_BSD, _), sown = model.apply(
            {"params": params}, batch["inputs"], key=model_key, **beside_inputs(batch), mutable=kept
        )
        how = {"chunks": loss_chunks, "key": head_key}
        if model.config.head.boxes:
            found = (output_of(model.config, params)(hidden_BSD, head_key), sown[FOUND][BOXES])
            total, _ = detection_loss(*found, batch["targets"], batch["boxes"], batch["mask"])
            objective = total
        elif ctc_blank is not None:
            output = output_of(model.config, params)
            frames = batch.get("valid")
            how = {"blank": ctc_blank, "key": head_key}
            total, _ = ctc_loss(hidden_BSD, output, batch["targets"], batch["mask"], frames, **how)
            objective = total
        elif jnp.issubdtype(batch["targets"].dtype, jnp.floating):
            if distiller is not None:
                raise ValueError("A distiller compares probabilities, and a number has none; leave out the teacher.")
            output = output_of(model.config, params)
            total, _ = squared_error(hidden_BSD, output, batch["targets"], batch["mask"], key=head_key)
            objective = total
        elif "shares" in batch:
            if distiller is not None:
                raise ValueError("A teacher takes one label for each answer; leave it out, or mix no images.")
            output = output_of(model.config, params)
            total, _ = shared_cross_entropy(hidden_BSD, output, batch["shares"], batch["mask"], key=head_key)
            objective = total
        elif distiller is None:
            output = output_of(model.config, params)
            total, _ = cross_entropy(hidden_BSD, output, batch["targets"], batch["mask"], **how)
            objective = total
        else:
            objective, total = distiller.loss_sum(model, hidden_BSD, sown, params, batch, trainable, teacher, **how)
        # A microbatch counts by its targets, in the router's losses as in the other.
        count = jnp.sum(batch["mask"])
        sums = {"loss": total} | {name: loss * count for name, loss in sown.get("losses", {}).items()}
        return objective + sum(weight * sums[name] for name, weight in router_losses.items() if name in sums), sums

    def train_step(state: TrainState, batch: Batch, teacher: weights.Params | None = None):
        if offload:
            state = state.replace(optimizer=jax.device_put(state.optimizer, jax.memory.Space.Device))
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        trainable, frozen = weights.partition(state.params)
        trainable |= state.beside
        # Images without an object are learned from too.
        count = jnp.maximum(jnp.sum(batch["mask"]), 1)
        grad = jax.grad(loss_sums, has_aux=True)

        if accumulation == 1:
            gradient, sums = grad(trainable, frozen, state.params, batch, key, teacher)
        else:

            def one(carry, microbatch):
                index, *sums = carry
                batch = {name: constrain(x, "batch", "length") for name, x in microbatch.items()}
                new = grad(trainable, frozen, state.params, batch, jax.random.fold_in(key, index), teacher)
                return (index + 1, *jax.tree.map(jnp.add, tuple(sums), new)), None

            parts = {name: microbatches(x, accumulation) for name, x in batch.items()}
            names = ("loss", *(LOSSES if model.config.experts else ()))
            zeros = (
                jax.tree.map(lambda a: jnp.zeros_like(a, jnp.float32), trainable),
                dict.fromkeys(names, jnp.zeros(())),
            )
            (_, gradient, sums), _ = lax.scan(one, (jnp.zeros((), jnp.int32), *zeros), parts)

        gradient = jax.tree.map(lambda g: g / count, gradient)
        kept = weights.kept_gradients(state.params, gradient)
        updates, optimizer_state = optimizer.update(kept, state.optimizer, trainable)
        # The arithmetic is float32 whatever is kept; what is kept must not become wider from step to step.
        optimizer_state = jax.tree.map(lambda new, old: new.astype(old.dtype), optimizer_state, state.optimizer)
        updated = optax.apply_updates(trainable, updates)
        params = weights.combine(state.params, updated, frozen)
        params = transform.update(params, state.step, gradient)
        if transform.last_step() >= 0:
            optimizer_state = weights.forget_pruned(params, optimizer_state)
        beside = {name: updated[name] for name in state.beside}
        metrics = {name: total / count for name, total in sums.items()}
        metrics["gradient_norm"] = optax.global_norm(kept)
        sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        metrics["skipped"] = 1 - sound.astype(jnp.float32)
        made, before = (params, optimizer_state, beside), (state.params, state.optimizer, state.beside)
        made = jax.tree.map(lambda new, old: old if new is old else jnp.where(sound, new, old), made, before)
        return TrainState(state.step + 1, made[0], made[1], state.key, made[2]), metrics

    return train_step
