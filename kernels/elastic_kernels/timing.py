"""Times candidates against each other on a machine that does other work as well.

Absolute times of a shared machine mean little. Candidates are run in turn, round
after round in one process, so that whatever slows one slows all, and processor time
is charged rather than elapsed time, so that being preempted costs nothing.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import jax


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one candidate took over the rounds."""

    min_seconds: float
    median_seconds: float


def alternate(
    candidates: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Runs every candidate once a round, in turn, after one unmeasured call each.

    Args:
      candidates: name -> thunk; what it returns is waited for.
      rounds: measured calls of each candidate.
      clock: `time.process_time` counts the processor seconds of all threads of the
        process: pin it to one thread before comparing. `time.perf_counter` elapsed.

    Returns:
      name -> Timing. Compare minima; a median far above its minimum is noise.

    Raises:
      ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"alternate: rounds must be at least 1, got {rounds}")
    for thunk in candidates.values():
        jax.block_until_ready(thunk())
    seconds = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, thunk in candidates.items():
            start = clock()
            jax.block_until_ready(thunk())
            seconds[name].append(clock() - start)
    return {
        name: Timing(min(taken), statistics.median(taken))
        for name, taken in seconds.items()
    }
