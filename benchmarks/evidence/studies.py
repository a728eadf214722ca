"""Which runs the protocol has: cells of the experiment, how strong the model is, and the methods in each."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .choices import CHOICES, Choice
from .methods import GROUP_RADII, KEY_METHODS, METHODS, POOLS, RADII, TV_RADII, Make
from .truth import Truth

SHARES, CONFLICTS, NOISES = (0.01, 0.1, 0.3), (0.0, 0.5, 1.0), (0.0, 0.1, 0.2)
BASE = Truth()
GROUPS = 16  # of prompts
# Where the ways to choose a radius are compared.
CHOOSING = (
    BASE,
    Truth(noise=0.2),
    Truth(share=0.01),
    Truth(share=0.3),
    Truth(conflict=0.0),
    Truth(conflict=0.0, noise=0.2),
)


@dataclass(frozen=True)
class Study:
    """`truth` None is tier B, the human labels. Beside methods there are choices of a radius, one for each run."""

    truth: Truth | None
    capacity: str
    methods: dict[str, Make] | dict[str, Choice]

    @property
    def about(self) -> dict[str, object]:
        """How its rows name the task."""
        return {"tier": "human"} if self.truth is None else {"tier": "known", **asdict(self.truth)}


def studies(smoke: bool = False) -> list[Study]:
    """All of them, or a few of each kind."""
    if smoke:
        few = {name: METHODS[name] for name in ("plain", "TV .1", "group DRO")}
        return [
            Study(BASE, "linear", METHODS),
            Study(Truth(share=0.3, noise=0.2), "mlp", few),
            Study(None, "linear", few),
            Study(None, "bag of words", {"plain": METHODS["plain"]}),
            Study(BASE, "linear", POOLS),
            Study(BASE, "linear", CHOICES),
        ]
    noisy, plain = Truth(noise=0.2), {"plain": METHODS["plain"]}
    one_factor = {
        *(Truth(share=share) for share in SHARES),
        *(Truth(conflict=conflict) for conflict in CONFLICTS),
        *(Truth(noise=noise) for noise in NOISES),
    }
    cells = sorted(one_factor, key=lambda truth: (truth.share, -truth.conflict, truth.noise))
    return [
        *(Study(truth, "bag of words", plain) for truth in (BASE, noisy, None)),
        *(Study(truth, "linear", METHODS) for truth in (BASE, None, noisy)),
        *(Study(truth, "mlp", KEY_METHODS) for truth in (BASE, None, noisy)),
        *(Study(truth, "linear", KEY_METHODS) for truth in cells),
        *(Study(truth, "linear", RADII | GROUP_RADII) for truth in (BASE, noisy)),
        Study(BASE, "linear", POOLS),
        *(Study(truth, "linear", plain | TV_RADII) for truth in CHOOSING),
        *(Study(truth, "linear", CHOICES) for truth in CHOOSING),
    ]
