"""Comparing flows with runs, in one lane and in several, and labelled results."""

import dataclasses
from functools import lru_cache, partial

import chex
import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import lane

import rodjax as rj

# The cheapest: what is compared is not the point.
EULER = {"solver": diffrax.Euler(), "substeps": 1}
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([[0.5]])}
RATES = jnp.array([0.05, 0.1, 0.2])


def loss(params):
    return 0.5 * jnp.sum(params["a"] ** 2) + jnp.sum(params["b"] ** 4)


SGD = rj.dynamics(optax.sgd, loss)
FLOWS = {"stable": rj.flows.stable(SGD), "rod": rj.flows.rod(SGD)}
descend = partial(rj.descend, SGD)


def integrate(name, *rest, **options):
    return rj.integrate(FLOWS[name], *rest, **EULER, **options)


@lru_cache
def pair(name="stable", lr=0.1):
    """A run of six steps from a window, and a flow beside it."""
    window = rj.warm_up(SGD, PARAMS, 4, lr=lr)
    return descend(window, 6, lr=lr), integrate(name, window, 6, lr=lr)


@lru_cache
def many():
    """The same for three learning rates at once, compared inside of the vmap too."""

    def one(lr):
        window = rj.warm_up(SGD, PARAMS, 4, lr=lr)
        run, flow = descend(window, 6, lr=lr), integrate("stable", window, 6, lr=lr)
        return run, flow, rj.compare(run, flow)

    return jax.jit(jax.vmap(one))(RATES)


def iterates(lr, steps):
    path = [PARAMS]
    for _ in range(steps):
        grad = jax.grad(loss)(path[-1])
        path.append(jax.tree.map(lambda p, g: p - lr * g, path[-1], grad))
    return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(p)]) for p in path]


@pytest.mark.parametrize("name", FLOWS)
def test_distance_is_to_the_midpoints_the_flow_models(name):
    run, path = pair(name)
    found = rj.compare(run, path).distance
    w = iterates(0.1, 11)
    for k, t in enumerate(range(4, 11)):
        middle = (w[t - 1] + 2 * w[t] + w[t + 1]) / 4
        if name == "rod":
            middle = (w[t] + w[t + 1]) / 2
        centre = np.concatenate([np.ravel(x[k]) for x in jax.tree.leaves(path.params)])
        np.testing.assert_allclose(found[k], np.linalg.norm(centre - middle), rtol=1e-9)


def test_projected_trajectories_compare_by_their_projection():
    keep = {"lr": 0.1, "keep": lambda params: params["a"]}
    run, path = descend(PARAMS, 3, **keep), integrate("stable", PARAMS, 3, **keep)
    expected = jnp.linalg.norm(path.params - run.params, axis=1)
    np.testing.assert_allclose(rj.compare(run, path).distance, expected)


# --- summaries -----------------------------------------------------------------------


def cut(path, moments):
    """The path as if it had diverged after so many moments."""
    shown = (path.params, path.ends, path.metrics)
    lost = jax.tree.map(lambda x: x.at[moments:].set(jnp.nan), shown)
    return dataclasses.replace(
        path,
        **dict(zip(("params", "ends", "metrics"), lost, strict=True)),
        diverged_at=path.steps[0] + moments,
    )


def test_summary_keeps_to_finite_entries():
    run, path = pair()
    whole, part = rj.compare(run, path), rj.compare(run, cut(path, 4)).summary()
    assert part["final_distance"] == float(whole.distance[3])
    np.testing.assert_allclose(part["mean_distance"], whole.distance[:4].mean())
    assert part["final_loss"] == float(path.metrics["loss"][3])
    assert part["diverged_at"] == 8.0
    assert np.isnan(part["median_sharpness_ratio"])
    assert {type(value) for value in part.values()} == {float}


def test_printing_one_lane_shows_its_summary_and_the_runs():
    run, path = pair()
    text = str(rj.compare(run, path))
    shown = dict(line.rsplit(maxsplit=1) for line in text.splitlines())
    for name, value in rj.compare(run, path).summary().items():
        np.testing.assert_allclose(float(shown[name]), value, rtol=1e-5)
    for name in ("mean_loss", "amplitude"):
        for of, suffix in ((path, ""), (run, " (run)")):
            found = float(shown[f"final_{name}{suffix}"])
            np.testing.assert_allclose(found, of.metrics[name][-1], rtol=1e-5)


def test_lanes_compared_at_once_are_as_if_alone():
    runs, paths, inside = many()
    outside = rj.compare(runs, paths)
    assert outside.distance.shape == (3, 7)
    chex.assert_trees_all_close(outside, inside, rtol=1e-12)
    for i, lr in enumerate(RATES):
        alone = rj.compare(*pair(lr=float(lr)))
        np.testing.assert_allclose(outside.distance[i], alone.distance, rtol=1e-12)


def test_summary_is_of_one_lane():
    runs, paths, _ = many()
    both = rj.compare(runs, paths)
    with pytest.raises(ValueError, match=r"lanes of shape \(3,\): take one"):
        both.summary()
    for i in range(3):
        alone = rj.compare(lane(runs, i), lane(paths, i)).summary()
        np.testing.assert_equal(lane(both, i).summary(), alone)


def test_printing_lanes_shows_their_shape_and_medians():
    runs, paths, _ = many()
    # One of three is lost; its last finite values count.
    lost = cut(lane(paths, 2), 4)
    paths = jax.tree.map(lambda x, y: jnp.concatenate([x[:2], y[None]]), paths, lost)
    both = rj.compare(runs, paths)
    head, *lines = str(both).splitlines()
    assert head == "medians over 3 lanes of shape (3,), 1 of them diverged"
    shown = dict(line.rsplit(maxsplit=1) for line in lines)
    for name, of in (("distance", both.distance), ("loss", paths.metrics["loss"])):
        last = [of[0, -1], of[1, -1], of[2, 3]]
        found = float(shown[f"final_{name}"])
        np.testing.assert_allclose(found, np.median(last), rtol=1e-5)
    mean = [np.nanmean(row) for row in np.asarray(both.distance)]
    np.testing.assert_allclose(float(shown["mean_distance"]), np.median(mean), 1e-5)
    found = float(shown["final_amplitude (run)"])
    np.testing.assert_allclose(found, np.median(runs.metrics["amplitude"][:, -1]), 1e-5)
    assert shown["median_sharpness_ratio"] == "nan"
    # In any arrangement.
    square = jax.tree.map(lambda x: x[None], both)
    head, *same = str(square).splitlines()
    assert "3 lanes of shape (1, 3)" in head and same == lines


def test_the_limit_is_told_beside_the_distance():
    window, (run, path) = rj.warm_up(SGD, PARAMS, 4, lr=0.1), pair()
    nudged = rj.predictability(SGD, window, 6, lr=0.1)
    both = rj.compare(run, path, predictability=nudged)
    np.testing.assert_array_equal(both.limit, nudged.distance)
    without, summary = rj.compare(run, path).summary(), both.summary()
    of_limit = {"final_limit", "mean_limit"}
    assert summary.keys() - without.keys() == of_limit
    assert summary["final_limit"] == nudged.summary()["final_distance"]
    np.testing.assert_allclose(summary["mean_limit"], nudged.distance.mean())
    shown = dict(line.rsplit(maxsplit=1) for line in str(both).splitlines())
    assert of_limit <= shown.keys() and "limit" not in str(rj.compare(run, path))
    later = rj.predictability(SGD, PARAMS, 6, lr=0.1)
    with pytest.raises(ValueError, match="predictability is of other steps"):
        rj.compare(run, path, predictability=later)


def test_the_picture_shades_what_is_below_the_limit():
    run, path = pair()
    limit = rj.compare(run, path)
    axes = rj.plot(run, path, predictability=limit).axes[2]
    (area,) = axes.collections
    edge = area.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose(edge.max(), limit.distance.max())
    assert not rj.plot(run, path).axes[2].collections


# --- refusals ------------------------------------------------------------------------


def test_bad_pairs_are_refused():
    run, path = pair()
    nothing = {"params": None, "ends": None}
    for other, message in (
        (lane((path.steps, path.params, path.ends), slice(3)), "steps= and every="),
        ((path.steps + 5, path.params, path.ends), "different steps"),
        ((path.steps - 0.5, path.params, path.ends), "different steps"),
        ((path.steps, path.params["a"], path.ends["a"]), "keep="),
    ):
        steps, params, ends = other
        changed = dataclasses.replace(path, steps=steps, params=params, ends=ends)
        with pytest.raises(ValueError, match=message):
            rj.compare(run, changed)
    with pytest.raises(ValueError, match="no parameters"):
        rj.compare(*(dataclasses.replace(of, **nothing) for of in (run, path)))


# --- data sets -----------------------------------------------------------------------


def test_dataset_is_labelled_and_survives_a_file(tmp_path):
    import xarray

    run, paths = pair()[0], {name: pair(name)[1] for name in FLOWS}
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
