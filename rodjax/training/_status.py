"""Where a run stands, in a word that does not flicker."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

#: By its code in a report, the word for where a run stands.
STATUS = (
    "unknown",
    "no second moment yet",
    "below",
    "sharpening",
    "at the edge",
    "unstable",
)
UNKNOWN, NO_MOMENT, BELOW, SHARPENING, AT_EDGE, UNSTABLE = range(len(STATUS))

# The ratio to enter "at the edge" and "unstable" with, and to stay there with.
EDGE, STILL_EDGE = 0.9, 0.85
ABOVE, STILL_ABOVE = 1.1, 1.05
# Relative to its average over a few probes, the ratio to enter "sharpening" with.
GROWS = 1.02
# Weight of the average's past.
PAST = 0.7
# How near to one the realized edge is, and how far above its floor an oscillation.
NEAR, CLEAR = 0.1, 2.0
# Standard errors by which a loss has changed.
SURE = 2.0


class Course(NamedTuple):
    """What the loss and the ratio have been.

    - `losses`, `mean`, `spread`: of the losses since the last probe, as Welford's.
    - `before`: count, mean and squared standard error of those before it.
    - `lost`: whether the last of them was not finite.
    - `ratio`: average of the ratio over a few probes; zero before the first.
    """

    losses: Float[Array, ""]
    mean: Float[Array, ""]
    spread: Float[Array, ""]
    before: Float[Array, "3"]
    lost: Bool[Array, ""]
    ratio: Float[Array, ""]


def no_course(dtype: jnp.dtype) -> Course:
    """Before the first step; of arrays of their own, which a step may donate."""
    zero = lambda: jnp.zeros((), dtype)
    lost, before = jnp.zeros((), bool), jnp.zeros(3, dtype)
    return Course(zero(), zero(), zero(), before, lost, zero())


def with_loss(course: Course, loss: Array) -> Course:
    """One loss more. One that is not finite counts as nothing."""
    loss = jnp.asarray(loss, course.mean.dtype)
    count = course.losses + 1
    off = loss - course.mean
    mean = course.mean + off / count
    spread = course.spread + off * (loss - mean)
    ok = jnp.isfinite(loss)
    keep = lambda new, old: jnp.where(ok, new, old)
    return course._replace(
        lost=~ok,
        losses=keep(count, course.losses),
        mean=keep(mean, course.mean),
        spread=keep(spread, course.spread),
    )


class Look(NamedTuple):
    """What a probe found that the status is made of.

    - `ratio`: sharpness over threshold, if `there`.
    - `early`: whether there is no second moment yet.
    - `edge`: whether the realized edge is near one while the updates alternate.
    - `lost`: whether the step that was looked at raises the loss it was taken for.
    """

    ratio: Float[Array, ""]
    there: Bool[Array, ""]
    early: Bool[Array, ""]
    edge: Bool[Array, ""]
    lost: Bool[Array, ""]


def next_status(
    status: Int[Array, ""], course: Course, look: Look
) -> tuple[Int[Array, ""], Course]:
    """The status after a probe, and the course for the next.

    Unstable is a ratio above the edge while the step raises its own loss, or the loss
    rises by more than its scatter tells; it stays so until the ratio is back or the
    loss falls.
    """
    error = course.spread / jnp.maximum(course.losses - 1, 1)
    error = error / jnp.maximum(course.losses, 1)
    count, mean, its_error = course.before
    change = course.mean - mean
    sure = SURE * jnp.sqrt(error + its_error)
    both = (count > 0) & (course.losses > 0)
    rises, falls = both & (change > sure), both & (change < -sure)

    is_unstable = status == UNSTABLE
    high = look.there & (look.ratio > ABOVE) & (rises | look.lost)
    still = look.there & is_unstable & (look.ratio > STILL_ABOVE) & ~falls
    unstable = high | still | course.lost
    least = jnp.where(status >= AT_EDGE, STILL_EDGE, EDGE)
    edge = (look.there & (look.ratio >= least)) | look.edge
    least = course.ratio * jnp.where(status == SHARPENING, 1.0, GROWS)
    grows = (course.ratio > 0) & (look.ratio > least)

    word = jnp.where(grows, SHARPENING, BELOW)
    word = jnp.where(look.there, word, UNKNOWN)
    word = jnp.where(edge, AT_EDGE, word)
    word = jnp.where(look.early, NO_MOMENT, word)
    word = jnp.where(unstable, UNSTABLE, word)

    first = course.ratio == 0
    ratio = jnp.where(first, look.ratio, PAST * course.ratio + (1 - PAST) * look.ratio)
    before = jnp.stack([course.losses, course.mean, error])
    zero = jnp.zeros_like(course.losses)
    some = course.losses > 0
    return word.astype(status.dtype), Course(
        jnp.where(some, zero, course.losses),
        jnp.where(some, zero, course.mean),
        jnp.where(some, zero, course.spread),
        jnp.where(some, before, course.before),
        course.lost,
        jnp.where(look.there, ratio, course.ratio),
    )
