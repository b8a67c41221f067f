"""FLOPs, traffic and memory of compiled programs against counts by hand, and against the traced function's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxcost.cost import contractions, hlo, links, trace

P = PartitionSpec


def spec(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def cost_of(fn, *args):
    return hlo.compiled_cost(jax.jit(fn).lower(*args).compile())


def layer(x, w):
    return jnp.tanh(x @ w), None


def scanned_loss(w, x):
    """w (L, D, D), x (B, D)."""
    return jax.lax.scan(layer, x, w)[0].sum()


W, X = spec(6, 64, 64), spec(8, 64)
MATMUL = 2 * 8 * 64 * 64


def mesh_4x2():
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "tensor"))


@pytest.mark.parametrize(
    ("dtype", "output", "name"),
    [
        (jnp.float32, jnp.float32, "f32"),
        (jnp.bfloat16, jnp.float32, "bf16"),
        (jnp.int8, jnp.int32, "int8"),
    ],
)
@pytest.mark.parametrize("rows", [1, 4, 256])
def test_dot_of_each_type(dtype, output, name, rows):
    """A row by a matrix in a narrow float may be widened; its FLOPs stay."""
    args = spec(rows, 512, dtype=dtype), spec(512, 128, dtype=dtype)
    fn = functools.partial(jnp.dot, preferred_element_type=output)
    cost = cost_of(fn, *args)
    assert cost.flops == 2 * rows * 512 * 128 == trace.flops_of(fn, *args).flops
    assert cost.unestimated == ()
    if rows > 1:
        assert cost.flops_by_type == {name: cost.flops}


def test_bf16_result_is_widened_on_a_cpu():
    cost = cost_of(jnp.matmul, spec(64, 64, dtype=jnp.bfloat16), spec(64, 64, dtype=jnp.bfloat16))
    assert cost.flops_by_type == {"f32": 2 * 64**3}


def test_int8_matmul_with_a_scale():
    fn = lambda x, w: jnp.dot(x, w, preferred_element_type=jnp.int32).astype(jnp.float32) * 0.1  # noqa: E731
    cost = cost_of(fn, spec(64, 64, dtype=jnp.int8), spec(64, 64, dtype=jnp.int8))
    assert cost.flops_by_type == {"int8": 2 * 64**3}


def nested(w, x):
    return jax.lax.scan(lambda x, _: (jax.lax.scan(layer, x, w)[0], None), x, length=5)[0]


def remat_loss(w, x):
    def body(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), x, w)[0].sum()


def attention(q, k, v):
    """q, k, v (B, S, H, h)."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


HEADS = spec(2, 16, 4, 8)
PROGRAMS = {
    "scan": (scanned_loss, (W, X), 6 * MATMUL),
    "nested scans": (nested, (W, X), 30 * MATMUL),
    "gradient of a scan": (jax.grad(scanned_loss, argnums=(0, 1)), (W, X), 18 * MATMUL),
    "frozen weights": (jax.grad(lambda x, w: scanned_loss(w, x)), (X, W), 12 * MATMUL),
    "gradient with remat": (jax.grad(remat_loss, argnums=(0, 1)), (W, X), 48 * MATMUL),
    "fori_loop": (
        lambda w, x: jax.lax.fori_loop(2, 9, lambda i, x: x @ w, x),
        (spec(64, 64), X),
        7 * MATMUL,
    ),
    "attention": (attention, (HEADS,) * 3, 2 * 2 * (2 * 4 * 16 * 16 * 8)),
    "convolution": (convolution, (spec(2, 16, 16, 8), spec(3, 3, 8, 16)), 2 * 2 * 16 * 8 * 23 * 23),
    "cond": (
        lambda p, w, x: jax.lax.cond(p, lambda: x @ w @ w, lambda: x @ w),
        (spec(dtype=jnp.bool_), spec(64, 64), X),
        2 * MATMUL,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_against_hand_and_trace(name):
    fn, args, expected = PROGRAMS[name]
    cost = cost_of(fn, *args)
    assert trace.flops_of(fn, *args).flops == expected
    assert cost.flops == expected
    assert cost.unestimated == ()


def test_cost_analysis_would_have_counted_the_loop_once():
    """The reason this reader exists; if it fails, the compiler has learned to multiply."""
    compiled = jax.jit(scanned_loss).lower(W, X).compile()
    assert compiled.cost_analysis()["flops"] < 2 * MATMUL
    assert hlo.compiled_cost(compiled).flops == 6 * MATMUL


def test_loop_of_unknown_length_is_listed_and_not_counted():
    def loop(w, x):
        return jax.lax.while_loop(lambda x: x.sum() < 7, lambda x: x @ w, x) @ w

    cost = cost_of(loop, spec(64, 64), X)
    assert cost.flops == MATMUL
    assert len(cost.unestimated) == 1
    assert f"unknown trip count, {MATMUL} FLOPs a trip" in cost.unestimated[0]


def test_library_call_is_listed_by_name():
    cost = cost_of(jnp.linalg.cholesky, spec(8, 8))
    assert any("potrf" in name for name in cost.unestimated)


def test_sharded_matmul_splits_its_flops_and_reduces():
    mesh = mesh_4x2()
    x = spec(64, 128, sharding=NamedSharding(mesh, P("data", None)))
    up = spec(128, 256, sharding=NamedSharding(mesh, P(None, "tensor")))
    down = spec(256, 128, sharding=NamedSharding(mesh, P("tensor", None)))

    def mlp(x, up, down):
        return jax.lax.with_sharding_constraint((x @ up) @ down, NamedSharding(mesh, P("data", None)))

    cost = cost_of(mlp, x, up, down)
    assert cost.num_devices == 8
    assert cost.flops * 8 == cost.total_flops == 2 * 2 * 64 * 128 * 256 == trace.flops_of(mlp, x, up, down).flops
    # The partial sums of a device's 16 rows meet those of its one partner along `tensor`.
    assert cost.collectives == (links.Collective("all-reduce", 16 * 128 * 4, (0, 1), 1),)
    assert cost.collective_bytes == 16 * 128 * 4


def test_scanned_fsdp_gathers_each_layer():
    mesh = mesh_4x2()
    w = spec(6, 64, 64, sharding=NamedSharding(mesh, P(None, ("data", "tensor"), None)))
    x = spec(32, 64, sharding=NamedSharding(mesh, P(("data", "tensor"), None)))

    def forward(w, x):
        def body(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))), None

        return jax.lax.scan(body, x, w)[0]

    cost = cost_of(forward, w, x)
    assert cost.total_flops == 6 * 2 * 32 * 64 * 64
    gathered = sum(c.operand_bytes * c.group_size * c.times for c in cost.collectives if c.kind == "all-gather")
    assert gathered == 6 * 64 * 64 * 4


def test_memory_of_a_donated_step():
    step = jax.jit(lambda w, x: w - 0.1 * (x.T @ x), donate_argnums=0)
    cost = hlo.compiled_cost(step.lower(spec(64, 64), spec(8, 64)).compile())
    assert cost.argument_bytes == 4 * (64 * 64 + 8 * 64)
    assert cost.output_bytes == cost.alias_bytes == 4 * 64 * 64
    assert cost.peak_bytes >= cost.argument_bytes


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("all-gather", 300), ("reduce-scatter", 75), ("all-reduce", 150), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_link_bytes_of_a_ring_of_four(kind, expected):
    assert links.Collective(kind, operand_bytes=100, group=(0, 1, 2, 3), times=2).link_bytes == 2 * expected


def test_batched_matmul_as_a_tpu_convolution():
    """A window of the batch's size that meets one element a position: holes must not count."""
    window = contractions.WindowDimension(input_size=8, kernel_size=8, output_size=8, stride=7, input_dilation=8)
    assert window.valid_taps() == 8


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("padding", [-1, 0, 2])
@pytest.mark.parametrize("input_dilation", [1, 2, 4])
@pytest.mark.parametrize("kernel_dilation", [1, 3])
def test_valid_taps_by_enumeration(stride, padding, input_dilation, kernel_dilation):
    window = contractions.WindowDimension(7, 4, 5, stride, padding, input_dilation, kernel_dilation)
    positions = [o * stride + k * kernel_dilation - padding for o in range(5) for k in range(4)]
    inside = [p for p in positions if p % input_dilation == 0 and 0 <= p // input_dilation < 7]
    assert window.valid_taps() == len(inside)


# A TPU program has no known_trip_count, steps by 2, keeps the bound in the carried tuple and breaks lines in kernels.
TPU_PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

%body (p: (s32[], s32[], bf16[8,64], bf16[64,64])) -> (s32[], s32[], bf16[8,64], bf16[64,64]) {
  %p = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %n = s32[]{:T(128)} get-tuple-element(%p), index=1
  %x = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=2
  %w = bf16[64,64]{1,0} get-tuple-element(%p), index=3
  %y = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %w), dim_labels=bf_io->bf
  %gathered = bf16[8,64]{1,0} all-gather(%y), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %clone = bf16[8,64]{1,0} all-gather(%y), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %kernel = bf16[8,64]{1,0} custom-call(%y), custom_call_target="tpu_custom_call", frontend_attributes={kernel="line
 one {
 line two"}
  ROOT %out = (s32[], s32[], bf16[8,64], /*index=3*/bf16[64,64]) tuple(%next, %n, %kernel, /*index=3*/%w)
}, execution_thread="main"

%condition (p.1: (s32[], s32[], bf16[8,64], bf16[64,64])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, s32[]{:T(128)}, bf16[8,64]{1,0}, bf16[64,64]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=1
  ROOT %less = pred[]{:T(512)} compare(%i.1, %n.1), direction=LT
}

ENTRY %main (x.0: bf16[8,64], w.0: bf16[64,64]) -> bf16[8,64] {
  %x.0 = bf16[8,64]{1,0} parameter(0)
  %w.0 = bf16[64,64]{1,0} parameter(1)
  %one = s32[]{:T(128)} constant(1)
  %bound = s32[]{:T(128)} constant(10)
  %start = (s32[], s32[], bf16[8,64], bf16[64,64]) tuple(%one, %bound, %x.0, %w.0)
  %loop = (s32[], s32[], bf16[8,64], bf16[64,64]) while(%start), condition=%condition, body=%body
  ROOT %result = bf16[8,64]{1,0} get-tuple-element(%loop), index=2
}
"""


def test_tpu_loop_is_read_from_its_condition():
    """1, 3, 5, 7, 9 are five trips; the exchange printed twice is one."""
    cost = hlo.program_cost(TPU_PROGRAM)
    assert cost.flops_by_type == {"bf16": 5 * MATMUL}
    assert cost.collectives == (links.Collective("all-gather", 8 * 64 * 2, (0, 1), 5),)
    assert cost.unestimated == ("custom-call tpu_custom_call",)
    assert cost.peak_bytes is None


# The forms in which a TPU's compiler prints an exchange, each of bf16[8,64] between four devices.
FORMS = {
    "plain": """
  %out = bf16[32,64]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}""",
    "start and done": """
  %start = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,4]<=[4]
  %out = bf16[32,64]{1,0} all-gather-done(%start)""",
    "fusion and clones": """
  %first = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) fusion(%x), kind=kCustom, calls=%async_collective_fusion
  %out = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.clone""",
    "scatter": """
  %out = bf16[2,64]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter""",
    "sparsecore": """
  %start = ((bf16[8,64]), bf16[32,64], u32[]) async-start(%x), async_execution_thread="sparsecore", calls=%offloaded
  %out = bf16[32,64]{1,0} async-done(%start)""",
    "slices": """
  %token = token[] after-all()
  %send = (bf16[8,64]{1,0}, u32[], token[]) send(%x, %token), channel_id=2, frontend_attributes={\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[8,64]{1,0}, u32[], token[]) recv(%token), channel_id=1, frontend_attributes={\
_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (bf16[8,64]{1,0}, token[]) recv-done(%recv), channel_id=1
  %out = bf16[8,64]{1,0} get-tuple-element(%received), index=0""",
}
FORM_PROGRAM = """HloModule step, is_scheduled=true, num_partitions=4

%add (a.1: bf16[], b.1: bf16[]) -> bf16[] {
  %a.1 = bf16[] parameter(0)
  %b.1 = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a.1, %b.1)
}

%async_collective_fusion (a.2: bf16[8,64]) -> bf16[32,64] {
  %a.2 = bf16[8,64]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,64]{1,0} all-gather(%a.2), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}
}

%async_collective_fusion.clone (a.3: bf16[8,64]) -> bf16[32,64] {
  %a.3 = bf16[8,64]{1,0} parameter(0)
  ROOT %g.3 = bf16[32,64]{1,0} all-gather(%a.3), channel_id=7, replica_groups=mesh['axis_0'=4] {'axis_0'}
}

%all-reduce-scatter (a.4: bf16[8,64]) -> bf16[2,64] {
  %a.4 = bf16[8,64]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %r.4 = bf16[8,64]{1,0} all-reduce(%a.4), channel_id=8, replica_groups={}, to_apply=%add
  ROOT %s.4 = bf16[2,64]{1,0} dynamic-slice(%r.4, %zero, %zero), dynamic_slice_sizes={2,64}
}

%offloaded (a.5: bf16[8,64]) -> bf16[32,64] {
  %a.5 = bf16[8,64]{1,0} parameter(0)
  ROOT %g.5 = bf16[32,64]{1,0} all-gather(%a.5), channel_id=9, replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  %x = bf16[8,64]{1,0} parameter(0)FORM
  ROOT %result = bf16[8,64]{1,0} copy(%x)
}
"""


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_exchange_is_one_collective(form):
    cost = hlo.program_cost(FORM_PROGRAM.replace("FORM", FORMS[form]))
    kind, group = {
        "scatter": ("reduce-scatter", (0, 1, 2, 3)),
        "slices": ("all-reduce", (0, 4)),
    }.get(form, ("all-gather", (0, 1, 2, 3)))
    assert cost.collectives == (links.Collective(kind, 8 * 64 * 2, group, 1),)
    assert cost.unestimated == ()


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups={}", (0, 1, 2, 3)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", (0, 2)),
    ],
)
def test_groups_are_read_in_every_form(attributes, group):
    form = f"\n  %out = bf16[32,64]{{1,0}} all-gather(%x), channel_id=1, {attributes}, dimensions={{0}}"
    (found,) = hlo.program_cost(FORM_PROGRAM.replace("FORM", form)).collectives
    assert found.group == group


def test_a_permute_is_its_first_pair():
    form = "\n  %out = bf16[8,64]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{2,0}}"
    (found,) = hlo.program_cost(FORM_PROGRAM.replace("FORM", form)).collectives
    assert found == links.Collective("collective-permute", 8 * 64 * 2, (0, 2), 1)


def test_groups_that_cannot_be_read_are_listed():
    form = "\n  %out = bf16[32,64]{1,0} all-gather(%x), channel_id=1, replica_groups=mesh['a'=4] {'a':(1)2}"
    cost = hlo.program_cost(FORM_PROGRAM.replace("FORM", form))
    assert cost.collectives == () and cost.unestimated == ("all-gather out: unreadable replica groups",)


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.program_cost("module @jit_f {}")
