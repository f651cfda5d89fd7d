"""What `watch` reports: closed forms on quadratics, dense values on digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import dense_hessian, lane
from jax.flatten_util import ravel_pytree

import rodjax as rj
from rodjax.training import MEMORY, STATUS, report, watch
from rodjax.training._status import Look, next_status, no_course, with_loss

# Three, so that three products are all that there is to know.
H = jnp.array([4.0, 2.5, 1.0])
W = jnp.array([0.5, -1.0, 2.0])


def bowl(w, h=H):
    return 0.5 * jnp.sum(h * w**2)


def walk(tx, steps, start=W, losses=None, probe_fn=None, settle=()):
    """Reports after each of some steps, every of which may have a loss of its own."""
    params, state, found = start, tx.init(start), []
    extra = {} if probe_fn is None else {"probe_fn": probe_fn}

    @jax.jit
    def step(params, state, h):
        value_fn = lambda w: bowl(w, h)
        value, grad = jax.value_and_grad(value_fn)(params)
        updates, state = tx.update(
            grad, state, params, value=value, value_fn=value_fn, **extra
        )
        return optax.apply_updates(params, updates), state

    for h in [H] * steps if losses is None else losses:
        params, state = step(params, state, h)
        found.append(report(state))
    return found


def test_gradient_descent_on_a_quadratic():
    # s = -eta H w, so that with m_k = sum h^k w^2 the numbers are those below.
    eta, m = 0.3, [float(jnp.sum(H**k * W**2)) for k in range(4)]
    names = [
        "update_ratio",
        "realized_edge",
        "step_curvature",
        "sharpness_ratio",
        "sharpness",
        "batch_sharpness",
    ]
    tx = watch(optax.sgd(eta), every=1, quantities=names)
    (found,) = walk(tx, 1)
    expected = {
        "update_ratio": eta * (m[2] / m[0]) ** 0.5,
        "realized_edge": eta * m[3] / m[2] / 2,
        "step_curvature": eta * m[3] / m[2],
        # A Krylov space of all dimensions.
        "sharpness_ratio": eta * 4.0 / 2,
        "sharpness": 4.0,
        "batch_sharpness": m[3] / m[2],
        "batch_sharpness_batches": 1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, err_msg=name)
    assert found["sharpness_residual"] < 1e-9
    assert found["sharpness_ratio_residual"] < 1e-9
    assert np.isnan(found["batch_sharpness_error"])


def test_the_next_value_tells_the_full_batch_zeta():
    names = ("realized_edge",)
    full = watch(optax.adam(0.1), quantities=names, full_batch=True)
    each = watch(optax.adam(0.1), quantities=names, every=1)
    full, each = (
        [float(r["realized_edge"]) for r in walk(tx, 5)] for tx in (full, each)
    )
    assert np.isnan(full[0])
    np.testing.assert_allclose(full[1:], each[:-1], rtol=1e-9)


def test_batch_sharpness_is_a_mean_of_ratios_over_fresh_batches():
    losses = list(H[None] + jax.random.uniform(jax.random.key(0), (40, 3)))
    names = ("batch_sharpness", "noise_interaction")
    # A rate of zero, so that all gradients are at the same parameters.
    tx = watch(optax.sgd(0.0), every=1, quantities=names)
    found = walk(tx, 40, losses=losses, probe_fn=bowl)[-1]
    h = np.stack(losses)[-32:]
    grads = h * np.asarray(W)
    ratios = (h * grads**2).sum(1) / (grads**2).sum(1)
    np.testing.assert_allclose(found["batch_sharpness"], ratios.mean())
    error = ratios.std(ddof=1) / 32**0.5
    np.testing.assert_allclose(found["batch_sharpness_error"], error)
    assert found["batch_sharpness_batches"] == 32
    mean = ((np.asarray(H) * grads**2).sum(1)).mean() / float(jnp.sum((H * W) ** 2))
    np.testing.assert_allclose(found["noise_interaction"], mean)


def test_a_warm_start_converges_from_probe_to_probe():
    # So near to each other that the products of the first probe do not tell.
    h = jnp.linspace(0.1, 1.0, 2000)
    tx = watch(optax.sgd(0.1), every=1, quantities=("sharpness",))
    found = walk(tx, 40, start=jnp.ones(2000), losses=[h] * 40)
    off = [1 - float(r["sharpness"]) for r in found]
    assert off[0] > 1e-3 and 0 <= off[-1] < 0.3 * off[0]
    assert found[-1]["sharpness_residual"] < 0.5 * found[0]["sharpness_residual"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_ratio_is_one_at_the_edge(momentum):
    # Heavy ball's threshold is (2 + 2 b) / eta.
    eta = (2 + 2 * momentum) / 4.0
    optimizer = optax.sgd(eta, momentum=momentum or None)
    tx = watch(optimizer, every=1, quantities=("sharpness_ratio",))
    np.testing.assert_allclose(walk(tx, 1)[0]["sharpness_ratio"], 1.0, rtol=1e-6)


def test_active_clipping_lowers_the_ratio_by_as_much_as_it_clips():
    norm = float(jnp.linalg.norm(H * W))
    optimizer = optax.chain(optax.clip_by_global_norm(0.5 * norm), optax.sgd(0.4))
    tx = watch(optimizer, every=1, quantities=("sharpness_ratio",))
    of = rj.dynamics(optimizer, bowl)
    grad = H * W
    thresholds = rj.coordinate_thresholds(of, of.init(W), grad=grad)
    np.testing.assert_allclose(thresholds, 2 * 2 / 0.4, rtol=1e-6)
    expected = float(jnp.max(H / thresholds))
    np.testing.assert_allclose(walk(tx, 1)[0]["sharpness_ratio"], expected, rtol=1e-6)


def test_the_ratio_of_adam_is_that_of_its_state():
    optimizer = optax.adam(0.05)
    tx = watch(optimizer, every=1, quantities=("sharpness_ratio",))
    params, state = W, tx.init(W)
    for _ in range(3):
        before = params, state.inner
        updates, state = tx.update(jax.grad(bowl)(params), state, params, value_fn=bowl)
        params = optax.apply_updates(params, updates)
    of = rj.dynamics(optimizer, bowl)
    ratio = rj.sharpness_ratio(of, rj.State.of(of, *before)).value
    found = report(state)["sharpness_ratio"]
    np.testing.assert_allclose(found, ratio, rtol=1e-6)


def test_an_oscillation_that_is_nothing_else():
    # At eta h = 2, w only changes its sign: s_t = -2 (-1)^t w_0.
    names = ("oscillation", "sharpness_ratio", "alternation", "realized_edge")
    tx = watch(optax.sgd(0.5), every=1, quantities=names)
    found = walk(tx, 30, start=jnp.array([1.0]), losses=[jnp.array([4.0])] * 30)[-1]
    n, b = 30, MEMORY
    weight, spread = 1 - b**n, (1 - b) ** 2 * (1 - b ** (2 * n)) / (1 - b**2)
    np.testing.assert_allclose(found["oscillation"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        found["oscillation_floor"], spread**0.5 / weight, rtol=1e-6
    )
    np.testing.assert_allclose(found["alternation"], 0.5, rtol=1e-6)
    np.testing.assert_allclose(found["realized_edge"], 1.0, rtol=1e-6)
    assert STATUS[int(found["status"])] == "at the edge"


def test_noise_stays_near_its_floor_and_drowns_whole_updates():
    names = ("oscillation", "sharpness", "alternation")
    tx = watch(optax.sgd(0.1), every=1, quantities=names)
    start = W

    def step(state, key):
        grad = jax.random.normal(key, (3,))
        _, state = tx.update(grad, state, start, value_fn=bowl)
        return state, report(state)

    keys = jax.random.split(jax.random.key(0), 2000)
    _, found = jax.lax.scan(step, tx.init(start), keys)
    late = {name: np.asarray(x[200:]) for name, x in found.items()}
    # A third of the squared steps is in one of three directions; (1 - b) / (1 + b) of
    # that is left of white noise.
    floor = 3**-0.5 * ((1 - MEMORY) / (1 + MEMORY)) ** 0.5
    np.testing.assert_allclose(np.mean(late["oscillation_floor"]), floor, rtol=0.1)
    # The mean size of a normal variable.
    mean = floor * (2 / np.pi) ** 0.5
    np.testing.assert_allclose(np.mean(late["oscillation"]), mean, rtol=0.2)
    assert np.mean(late["oscillation"] > 3 * late["oscillation_floor"]) < 0.01
    assert np.median(late["alternation"]) > 0.2


def test_groups_have_their_block_and_their_share():
    start = {"a": W[:2], "b": {"c": W[2:]}}
    flat = lambda w: jnp.concatenate([w["a"], w["b"]["c"]])
    mixed = jnp.diag(H).at[0, 2].set(0.8).at[2, 0].set(0.8)
    loss = lambda w: 0.5 * flat(w) @ mixed @ flat(w)
    by = lambda path: path[0].key
    tx = watch(optax.sgd(0.1), quantities=("sharpness",), by=by)
    _, state = tx.update(jax.grad(loss)(start), tx.init(start), start, value_fn=loss)
    found = report(state)
    values, vectors = np.linalg.eigh(np.asarray(mixed))
    np.testing.assert_allclose(found["sharpness"], values[-1])
    np.testing.assert_allclose(found["block_sharpness/a"], 4.0)
    np.testing.assert_allclose(found["block_sharpness/b"], 1.0)
    np.testing.assert_allclose(found["share/a"], (vectors[:2, -1] ** 2).sum())
    np.testing.assert_allclose(found["share/a"] + found["share/b"], 1.0)
    assert found["block_sharpness_residual/a"] < 1e-6


def test_the_status_does_not_flicker():
    def words(ratios, losses, lost=False):
        status, course, path = (
            jnp.zeros((), jnp.int32),
            no_course(jnp.dtype("float64")),
            [],
        )
        no = jnp.zeros((), bool)
        for ratio, loss in zip(ratios, losses, strict=True):
            course = with_loss(course, jnp.asarray(loss))
            look = Look(jnp.asarray(ratio), ~no, no, no, no | lost)
            status, course = next_status(status, course, look)
            path.append(STATUS[int(status)])
        return path

    still = [1.0] * 20
    assert words([0.5, 0.5, 0.6, 0.7], still[:4]) == ["below"] * 2 + ["sharpening"] * 2
    edge = words([0.8, 0.92, 0.88, 0.91, 0.87, 0.8], still[:6])
    assert edge[1:5] == ["at the edge"] * 4 and edge[5] != "at the edge"
    rising = words([0.95, 1.2, 1.2, 1.08, 1.03], [1.0, 1.5, 2.0, 2.5, 3.0])
    assert rising == ["at the edge"] + ["unstable"] * 3 + ["at the edge"]
    # Above the edge, while the loss falls.
    assert words([1.2, 1.3, 1.2], [3.0, 2.0, 1.0]) == ["at the edge"] * 3
    # Unless the very step that is looked at raises its loss.
    assert words([1.2], [1.0], lost=True) == ["unstable"]
    assert words([0.95], [1.0], lost=True) == ["at the edge"]
    assert words([0.5, 0.5], [1.0, jnp.inf])[1] == "unstable"


def test_a_rate_beyond_the_edge_is_called_unstable():
    tx = watch(optax.sgd(2.4 / 4.0), every=2)
    found = walk(tx, 12, start=0.01 * W)
    np.testing.assert_allclose(found[0]["sharpness_ratio"], 1.2, rtol=1e-6)
    assert STATUS[int(found[-1]["status"])] == "unstable"
    assert found[-1]["realized_edge"] > 1 and found[-1]["step_curvature"] > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        (optax.sgd(0.6), 330),
        (optax.sgd(0.6, momentum=0.5), 300),
        (optax.adam(0.01), 200),
    ],
    ids=["gd", "momentum", "adam"],
)
def test_digits_within_five_percent_of_dense_values(optimizer, steps):
    problem = rj.problems.digits_mlp()
    names = ("realized_edge", "sharpness_ratio", "step_curvature")
    tx = watch(optimizer, quantities=names)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            value, grad = jax.value_and_grad(problem.loss)(params)
            updates, new = tx.update(
                grad, state, params, value=value, value_fn=problem.loss
            )
            after = optax.apply_updates(params, updates)
            return (after, new), (params, after, state.inner, report(new))

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[1]

    path = run(problem.params)
    of = rj.dynamics(optimizer, problem.loss)
    flat = lambda tree: np.asarray(ravel_pytree(tree)[0])
    sure = []
    for at in range(60, steps, 40):
        before, after, inner, found = lane(path, at)
        assert int(found["probed_at"]) == at
        hessian = dense_hessian(problem.loss, before)
        s, g = flat(after) - flat(before), flat(jax.grad(problem.loss)(before))
        zeta = 1 - (problem.loss(after) - problem.loss(before)) / (g @ s)
        np.testing.assert_allclose(found["realized_edge"], zeta, rtol=0.05)
        bend = s @ hessian @ s / -(s @ g)
        np.testing.assert_allclose(found["step_curvature"], bend, rtol=0.05)

        edges = rj.coordinate_thresholds(of, rj.State.of(of, before, inner))
        root = 1 / np.sqrt(flat(edges))
        ratio = np.linalg.eigvalsh(hessian * root * root[:, None])[-1]
        assert found["sharpness_ratio"] < ratio * (1 + 1e-6)
        # In a burst the direction turns faster than three products follow.
        sure.append(float(found["sharpness_ratio_residual"]) < 0.05)
        if sure[-1]:
            np.testing.assert_allclose(found["sharpness_ratio"], ratio, rtol=0.05)
    assert np.mean(sure) > 0.7


def test_the_status_knows_what_the_last_of_full_batch_steps_has_done():
    loss = lambda w: 2.0 * jnp.sum(w**2)  # curvature 4
    rate = lambda step: jnp.where(step < 1, 0.1, 0.6)
    names = ("sharpness_ratio", "realized_edge")
    tx = watch(optax.sgd(rate), every=2, quantities=names, full_batch=True)
    w = jnp.ones(1)
    state = tx.init(w)
    for _ in range(3):
        value, grad = jax.value_and_grad(loss)(w)
        updates, state = tx.update(grad, state, w, value=value, value_fn=loss)
        w = optax.apply_updates(w, updates)
    found = report(state)
    # The mean loss since the first probe has fallen, and the last step raised its own.
    np.testing.assert_allclose(found["realized_edge"], 1.2)
    np.testing.assert_allclose(found["sharpness_ratio"], 1.2)
    assert STATUS[int(found["status"])] == "unstable"
