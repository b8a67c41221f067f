"""An experiment's train step, compiled for a slice that this machine does not have."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcost import sharding
from jaxcost.config import Experiment
from jaxcost.models.transformer import Transformer, initialize
from jaxcost.planning.topology import StepPlan, plan_step, topology_chip, topology_devices
from jaxcost.training.loop import jitted_step
from jaxcost.training.optimizer import make_optimizer
from jaxcost.transforms import chain


def plan_training(experiment: Experiment, topology: str, vocab_size: int) -> StepPlan:
    """What the compiler of `topology`, such as 'v5e:2x2', makes of the train step with the experiment's transforms.

    Raises:
      PlanningUnavailable: libtpu is not installed.
      ValueError: the topology does not exist, or the experiment does not divide over its devices.
    """
    devices = list(topology_devices(topology))
    experiment.check_devices(len(devices), vocab_size)
    mesh = sharding.make_mesh(experiment.mesh, devices)
    execution = experiment.execution
    if execution.unroll == "auto":
        # `auto` asks for the platform that runs this process, which is not the one that is planned for.
        execution = dataclasses.replace(execution, unroll="never")
    model = Transformer(dataclasses.replace(experiment.model, vocab_size=vocab_size), execution)
    transform = chain(*experiment.transforms)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.steps)

    def make_params():
        return transform(initialize(model, jax.random.key(0))[0])

    shape = (experiment.data.batch_size, experiment.data.sequence_length)
    place = sharding.batch_sharding(mesh)
    dtypes = {"inputs": jnp.int32, "targets": jnp.int32, "mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, dtype in dtypes.items()}
    with jax.set_mesh(mesh):
        step, state = jitted_step(model, make_params, optimizer, transform, experiment.training, mesh)
        return plan_step(step, (state, batch), topology_chip(topology))
