"""Spending a budget of key/value heads where they keep the most energy."""

from collections.abc import Mapping

from gqa.errors import InputError

Place = tuple[str, int]  # attention site, number of the layer


def spend(budget: int, lost: Mapping[Place, Mapping[int, float]]) -> dict[Place, int]:
    """Heads for each layer and site, at most `budget` in all.

    Args:
      budget: key/value heads, summed over layers and sites.
      lost: for each place, a number of heads it may have -> the share of energy lost with it.

    Every place starts with its fewest; the step up that saves the most energy a head is taken while one fits. Raises
    `InputError` when the budget is under the fewest.
    """
    chosen = {place: min(options) for place, options in lost.items()}
    spent = sum(chosen.values())
    if spent > budget:
        raise InputError(f"a budget of {budget} key/value heads is under 1 for each layer and site; nearest: {spent}")
    while True:
        steps = [
            ((lost[place][now] - lost[place][more]) / (more - now), place, more)
            for place, now in chosen.items()
            for more in lost[place]
            if more > now and spent + more - now <= budget
        ]
        saved, place, more = max(steps, default=(0.0, None, 0), key=lambda step: step[0])
        if saved <= 0:
            return chosen
        spent += more - chosen[place]
        chosen[place] = more
