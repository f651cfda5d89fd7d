"""A stabilized explicit solver of second order for long steps."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from rodjax.solve._chebyshev import FEWEST, coefficients, reaches

# Bounds on rates per optimizer step: of a field that is corrected by BEA itself, where
# the sharpness is 1.5 of its threshold (2 ratio (1 + ratio)), and of one that is not.
CORRECTED, PLAIN = 8.0, 3.0
# With `bea` no step is computed over less: damping is lost where 1 - 1/h is below 1/3.
SHORTEST = 2.0


class RKC(diffrax.AbstractAdaptiveSolver):
    r"""Runge-Kutta-Chebyshev, second order: long explicit steps of stiff flows.

    The flow of an optimizer has rates of -2 per step and beyond (what alternates and
    should not, decays), which limit Heun's method to half an optimizer step, while what
    it is about moves within tens of them. A step of size h with s stages is

    $$Y_1 = Y_0 + \tilde\mu_1 h f_0, \quad Y_j = (1 - \mu_j - \nu_j) Y_0 + \mu_j Y_{j-1}
      + \nu_j Y_{j-2} + \tilde\mu_j h f_{j-1} + \tilde\gamma_j h f_0, \quad j \le s,$$

    whose stability polynomial, a shifted Chebyshev polynomial, is below 1 for all real
    rates down to $-\beta_s / h$ with $\beta_s \approx 0.65 (s^2 - 1)$: steps ten times
    as long cost three times as much. It takes s evaluations of the field, since the
    last slope is the next step's first. The error estimate is $\tfrac45 (y_0 - y_1) +
    \tfrac25 h (f_0 + f_1)$. Source: Sommeijer, Shampine, Verwer, *J. Comput. Appl.
    Math.* 88 (1997). Complex rates are damped within a narrow strip only.

    **Arguments**

    - `bea`: the field is the increment f of a unit step, $y \to y + f(y)$, and the
      solution is to follow that map (ours). Its h-fold iterate $(1 + f)^h$ begins with
      $1 + h f + \tfrac12 h (h - 1) f' f$: it is enough to ask of the polynomial a
      second coefficient smaller by $\theta = 1 - 1/h$, and the correction by backward
      error analysis, for which a flow of `degree=2` evaluates its field twice, is free.
      So it goes with flows of `degree=1`. The estimate becomes $\tfrac45 (y_0 -
      y_1) + \tfrac25 ((h + 1) f_0 + (h - 1) f_1)$. Steps shorter than 2 are
      interpolated from one of 2: ask a controller for `dtmin=2, force_dtmin=True`.
    - `radius`: a bound on the rates per unit of time (the spectral radius of the
      field's Jacobian); a step has the fewest stages that are stable for it. By default
      what serves a flow at a sharpness of 1.5 thresholds: 8, with `bea` 3. Where it is
      too low, the error estimate grows and an adaptive controller takes shorter steps.
    - `most`: stages of a step at most, which longer steps have too.
    - `stages`: a fixed number for every step, in place of both.
    - `scan_kind`: of its loop, as in diffrax: "checkpointed" for derivatives in
      reverse, "lax" for those forwards. `rodjax.integrate` sets it by its `adjoint`.

    Under `jax.vmap` every step has the stages of the lane that needs most of them.

    **Raises** `ValueError` for a `radius` that is not positive and fewer than 2 stages.

    ```python
    >>> import diffrax, jax.numpy as jnp, optax, rodjax as rj
    >>> stiff = diffrax.ODETerm(lambda t, y, args: -100.0 * (y - jnp.cos(t)))
    >>> solved = diffrax.diffeqsolve(
    ...     stiff, rj.RKC(radius=100.0), 0.0, 3.0, 0.5, jnp.array(1.0)
    ... )  # Heun's method is unstable with steps above 0.02
    >>> bool(abs(solved.ys[0] - jnp.cos(3.0 - 0.01)) < 0.01)
    True
    >>> valley = rj.problems.berthier(initial=(0.1, 6.5))
    >>> sgd = rj.dynamics(optax.sgd(0.3), valley.loss)
    >>> flow = rj.flows.modulated(sgd, degree=1)
    >>> path = rj.integrate(
    ...     flow, valley.params, 800, every=2, solver=rj.RKC(bea=True), substeps=0.5
    ... )
    >>> bool(abs(path.params["y"][-1] - 2 / 0.3) < 0.2)
    True

    ```
    """

    bea: bool = eqx.field(static=True, default=False)
    radius: float | None = eqx.field(static=True, default=None)
    most: int = eqx.field(static=True, default=40)
    stages: int | None = eqx.field(static=True, default=None)
    scan_kind: Literal["checkpointed", "bounded", "lax"] = eqx.field(
        static=True, default="checkpointed"
    )

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar[Callable[..., Any]] = (
        diffrax.ThirdOrderHermitePolynomialInterpolation
    )

    def __check_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise ValueError(f"radius must be positive, got {self.radius}")
        for name, value in (("most", self.most), ("stages", self.stages)):
            if value is not None and value < FEWEST:
                raise ValueError(f"{name} must be at least {FEWEST}, got {value}")

    def order(self, terms: Any) -> int:
        return 2

    def error_order(self, terms: Any) -> int:
        return 3

    def calls(self, span: Array) -> Array:
        """Evaluations of the field in a step of size `span`."""
        long, theta = self._computed(span)
        stages = self._stages(long, theta)
        return stages + (long > span) if self.bea else stages

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: PyTree) -> PyTree:
        return terms.vf(t0, y0, args)

    def func(self, terms: Any, t0: Any, y0: PyTree, args: PyTree) -> PyTree:
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: PyTree,
        solver_state: PyTree,
        made_jump: Any,
    ) -> Any:
        span = jnp.asarray(terms.contr(t0, t1))
        h, theta = self._computed(span)
        anew = lambda: terms.vf(t0, y0, args)
        f0 = jax.lax.cond(made_jump, anew, lambda: solver_state)
        y1 = self._stepped(terms, t0, h, theta, y0, args, f0)
        f1 = terms.vf(t0 + h, y1, args)
        # What the field corrected by BEA is short of this one, times h.
        lag = 0.5 if self.bea else 0.0
        k0, k1 = (
            jax.tree.map(lambda f, a, b: h * f - lag * (b - a), f, f0, f1)
            for f in (f0, f1)
        )
        error = jax.tree.map(
            lambda a, b, c, d: 0.8 * (a - b) + 0.4 * (c + d), y0, y1, k0, k1
        )
        if self.bea:
            short = self.interpolation_cls(t0=0.0, t1=h, y0=y0, y1=y1, k0=k0, k1=k1)
            part, y_long, f_long = span / h, y1, f1
            cut = part < 1
            y1 = jax.tree.map(
                lambda a, b: jnp.where(cut, a, b), short.evaluate(span), y_long
            )
            # Once for all lanes, for nearly all steps are whole ones.
            f1 = jax.lax.cond(
                eqxi.unvmap_any(cut), lambda: terms.vf(t1, y1, args), lambda: f_long
            )
            error = jax.tree.map(lambda e: part**3 * e, error)
            k0, k1 = (jax.tree.map(lambda k: part * k, k) for k in (k0, k1))
        dense = {"y0": y0, "y1": y1, "k0": k0, "k1": k1}
        return y1, error, dense, f1, diffrax.RESULTS.successful

    def _computed(self, span: Array) -> tuple[Array, Array]:
        """The size of the step that is computed, and theta."""
        if not self.bea:
            return span, jnp.ones_like(span)
        span = jnp.maximum(span, SHORTEST)
        return span, 1 - 1 / span

    def _stages(self, span: Array, theta: Array) -> Array:
        if self.stages is not None:
            return jnp.full_like(span, self.stages, jnp.int32)
        radius = self.radius or (PLAIN if self.bea else CORRECTED)
        # The polynomial with theta is stable for rates larger by 1 / theta.
        reach = jnp.asarray(reaches(self.most), span.dtype)
        needed = jnp.searchsorted(reach, radius * theta * span)
        return jnp.clip(needed, FEWEST, self.most).astype(jnp.int32)

    def _stepped(
        self,
        terms: Any,
        t0: Any,
        h: Array,
        theta: Array,
        y0: PyTree,
        args: PyTree,
        f0: PyTree,
    ) -> PyTree:
        """Y_s."""
        dtype = jnp.result_type(*jax.tree.leaves(y0))
        count = self._stages(h, theta)
        rows = jnp.asarray(coefficients(self.stages or self.most), dtype)[count]

        def stage(carry: tuple[Array, PyTree, PyTree]) -> tuple[Array, PyTree, PyTree]:
            j, before, last = carry
            mu, nu, mu_tilde, _, _ = rows[j]
            slope = theta * mu_tilde * h
            start = mu_tilde * (rows[j - 1, 3] - theta) * h
            f = terms.vf(t0 + rows[j - 1, 4] * h, last, args)
            new = jax.tree.map(
                lambda y, a, b, c, d: (
                    y + mu * (a - y) + nu * (b - y) + slope * c + start * d
                ),
                *(y0, last, before, f, f0),
            )
            return j + 1, last, new

        first = jax.tree.map(lambda y, f: y + rows[1, 2] * h * f, y0, f0)
        _, _, last = eqxi.while_loop(
            lambda carry: carry[0] <= count,
            stage,
            (jnp.asarray(2), y0, first),
            max_steps=self.stages or self.most,
            kind=self.scan_kind,
        )
        return last
