"""The feed-forward block that every token meets."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxcost import weights
from jaxcost.models.config import ModelConfig
from jaxcost.models.execution import named
from jaxcost.models.layers import Linear, activation, of_one_input
from jaxcost.sharding import constrain


class Mlp(nn.Module):
    """The feed-forward block, gated or plain, of hidden size `hidden`."""

    config: ModelConfig
    hidden: int

    @nn.compact
    def __call__(self, x_BTD, key):
        c = self.config
        keys = weights.split_keys(key, 3)
        names = ("up", "gate") if c.gated else ("up",)
        inward = [Linear(self.hidden, ("embed", "mlp"), c.mlp_bias, name=name) for name in names]
        up_BTF, *gate = of_one_input(inward, x_BTD, keys)
        up_BTF, gate_BTF = named(up_BTF, "mlp_up"), named(gate[0], "mlp_gate") if gate else None
        hidden_BTF = constrain(activated(c, up_BTF, gate_BTF), "batch", "length", "mlp")
        return Linear(c.width, ("mlp", "embed"), c.mlp_bias, name="down")(hidden_BTF, keys[2])


def activated(config: ModelConfig, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """What the last matrix meets: act(gate)·up, or act(up) without a gate. Source: Shazeer 2020, arXiv:2002.05202."""
    act = activation(config.activation)
    return act(up) if gate is None else act(gate) * up
