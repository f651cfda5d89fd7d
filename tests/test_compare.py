"""Comparing flows with runs, and labelled results."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rodjax as rj


def loss(params):
    return 0.5 * jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 4)


PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}


@pytest.fixture(scope="module")
def dynamics():
    return rj.dynamics(optax.sgd, loss)


@pytest.fixture(scope="module")
def flows(dynamics):
    return {"stable": rj.flows.stable(dynamics), "rod": rj.flows.rod(dynamics)}


def iterates(lr, steps):
    path = [PARAMS]
    for _ in range(steps):
        grad = jax.grad(loss)(path[-1])
        path.append(jax.tree.map(lambda p, g: p - lr * g, path[-1], grad))
    return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in path]


@pytest.mark.parametrize("name", ["stable", "rod"])
def test_distance_is_to_the_midpoints_the_flow_models(dynamics, flows, name):
    lr, start, steps = 0.1, 4, 6
    window = rj.warm_up(dynamics, PARAMS, start, lr=lr)
    run = rj.descend(dynamics, window, steps, lr=lr)
    path = rj.integrate(flows[name], window, steps, lr=lr)
    found = rj.compare(run, path).distance
    w = iterates(lr, start + steps + 1)
    for k in range(steps + 1):
        t = start + k
        middle = (w[t - 1] + 2 * w[t] + w[t + 1]) / 4
        if name == "rod":
            middle = (w[t] + w[t + 1]) / 2
        centre = np.concatenate([np.ravel(x[k]) for x in jax.tree.leaves(path.params)])
        np.testing.assert_allclose(found[k], np.linalg.norm(centre - middle), rtol=1e-9)


def test_vmapped_comparison_equals_single_ones(dynamics, flows):
    rates = jnp.array([0.05, 0.1])
    both = lambda lr: rj.compare(
        rj.descend(dynamics, PARAMS, 4, lr=lr),
        rj.integrate(flows["stable"], PARAMS, 4, lr=lr),
    )
    stacked = jax.vmap(lambda lr: both(lr).distance)(rates)
    assert stacked.shape == (2, 5)
    for row, lr in zip(stacked, rates, strict=True):
        np.testing.assert_allclose(row, both(lr).distance, rtol=1e-12)
    # Batched trajectories compared after the vmap give the same.
    paths = jax.vmap(lambda lr: rj.integrate(flows["stable"], PARAMS, 4, lr=lr))(rates)
    runs = jax.vmap(lambda lr: rj.descend(dynamics, PARAMS, 4, lr=lr))(rates)
    np.testing.assert_allclose(rj.compare(runs, paths).distance, stacked, rtol=1e-12)


def test_of_several_lanes_medians_are_printed(dynamics, flows):
    rates = jnp.array([[0.05, 0.1, 3.0], [0.02, 0.2, 0.15]])
    both = lambda lr: rj.compare(
        rj.descend(dynamics, PARAMS, 4, lr=lr),
        rj.integrate(flows["stable"], PARAMS, 4, lr=lr),
    )
    batch = jax.vmap(jax.vmap(both))(rates)
    head, *rows = str(batch).splitlines()
    lost = int(np.sum(np.isfinite(batch.diverged_at)))
    assert head == f"medians over 6 lanes of shape (2, 3), {lost} of them diverged"
    printed = {name: float(row) for name, row in (r.rsplit(None, 1) for r in rows)}
    # The last finite entry of each lane, by hand.
    last = [d[np.isfinite(d)][-1] for d in np.reshape(batch.distance, (6, 5))]
    np.testing.assert_allclose(printed["final_distance"], np.median(last), rtol=1e-5)
    evaluations = np.median(batch.evaluations)
    assert printed["update_evaluations"] == evaluations
    with pytest.raises(ValueError, match=r"lanes of shape \(2, 3\): take one"):
        batch.summary()
    one = jax.tree.map(lambda x: x[1, 0], batch)
    alone = both(0.02).summary()
    np.testing.assert_allclose(one.summary()["final_distance"], alone["final_distance"])


def test_summary_keeps_to_finite_entries(dynamics, flows):
    # lr 3 diverges: the run's entries after that are NaN.
    window = rj.warm_up(dynamics, PARAMS, 0, lr=0.1)
    run = rj.descend(dynamics, window, 6, lr=0.1)
    path = rj.integrate(flows["stable"], window, 6, lr=0.1)
    cut = dataclasses.replace(
        path,
        params=jax.tree.map(lambda x: x.at[4:].set(jnp.nan), path.params),
        diverged_at=jnp.asarray(4.0),
    )
    whole, part = rj.compare(run, path), rj.compare(run, cut).summary()
    assert part["final_distance"] == float(whole.distance[3])
    np.testing.assert_allclose(part["mean_distance"], whole.distance[:4].mean())
    assert part["diverged_at"] == 4.0
    assert np.isnan(part["median_sharpness_ratio"])
    assert "final_amplitude (run)" in str(whole)


def test_projected_trajectories_compare_by_their_projection(dynamics, flows):
    only_a = lambda params: params["a"]
    run = rj.descend(dynamics, PARAMS, 3, lr=0.1, keep=only_a)
    path = rj.integrate(flows["stable"], PARAMS, 3, lr=0.1, keep=only_a)
    expected = jnp.linalg.norm(path.params - run.params, axis=1)
    np.testing.assert_allclose(rj.compare(run, path).distance, expected)


def test_bad_pairs_are_refused(dynamics, flows):
    run = rj.descend(dynamics, PARAMS, 4, lr=0.1)
    path = lambda **kw: rj.integrate(flows["stable"], lr=0.1, **kw)
    with pytest.raises(ValueError, match="steps= and every="):
        rj.compare(run, path(start=PARAMS, steps=2))
    window = rj.warm_up(dynamics, PARAMS, 5, lr=0.1)
    with pytest.raises(ValueError, match="different steps"):
        rj.compare(run, path(start=window, steps=4))
    with pytest.raises(ValueError, match="keep="):
        rj.compare(run, path(start=PARAMS, steps=4, keep=lambda p: p["a"]))
    nothing = {"keep": lambda p: None}
    with pytest.raises(ValueError, match="no parameters"):
        rj.compare(
            rj.descend(dynamics, PARAMS, 4, lr=0.1, **nothing),
            path(start=PARAMS, steps=4, **nothing),
        )


def test_dataset_is_labelled_and_survives_a_file(dynamics, flows, tmp_path):
    import xarray

    run = rj.descend(dynamics, PARAMS, 4, lr=0.1)
    paths = {
        name: rj.integrate(flow, PARAMS, 4, lr=0.1) for name, flow in flows.items()
    }
    data = rj.dataset(run, paths, lr=0.1, problem="toy")
    data.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    with xarray.open_dataset(tmp_path / "x.nc", engine="h5netcdf") as read:
        assert list(read.flow.values) == ["run", "stable", "rod"]
        np.testing.assert_array_equal(
            read.loss.sel(flow="rod"), paths["rod"].metrics["loss"]
        )
        np.testing.assert_array_equal(
            read.distance.sel(flow="stable"), rj.compare(run, paths["stable"]).distance
        )
        assert read.attrs["lr"] == 0.1
        assert read.step.attrs["units"] == "optimizer steps"
