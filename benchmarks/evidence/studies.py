"""Which runs the protocol has: cells of the experiment, how strong the model is, and the methods in each."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .methods import METHODS, POOLS, RADII, Make
from .truth import Truth

SHARES, CONFLICTS, NOISES = (0.01, 0.03, 0.1, 0.3), (0.0, 0.5, 1.0), (0.0, 0.1, 0.2)
BASE = Truth()


@dataclass(frozen=True)
class Study:
    """`truth` None is tier B, the human labels."""

    truth: Truth | None
    capacity: str
    methods: dict[str, Make]

    @property
    def about(self) -> dict[str, object]:
        """How its rows name the task."""
        return {"tier": "human"} if self.truth is None else {"tier": "known", **asdict(self.truth)}


def studies() -> list[Study]:
    one_factor = {
        BASE,
        *(Truth(share=share) for share in SHARES),
        *(Truth(conflict=conflict) for conflict in CONFLICTS),
        *(Truth(noise=noise) for noise in NOISES),
    }
    cells = sorted(one_factor, key=lambda truth: (truth.share, -truth.conflict, truth.noise))
    plain = {"plain": METHODS["plain"]}
    return [
        *(Study(truth, "linear", METHODS) for truth in cells),
        Study(None, "linear", METHODS),
        *(Study(truth, "mlp", METHODS) for truth in (BASE, Truth(noise=0.2), None)),
        *(Study(Truth(noise=noise), "linear", RADII) for noise in (0.0, 0.2)),
        *(Study(truth, "bag of words", plain) for truth in (*cells, None)),
        Study(BASE, "linear", POOLS),
    ]
