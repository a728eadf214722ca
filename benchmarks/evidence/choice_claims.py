"""What the sentences about choosing a radius say, as conditions on the results."""

from __future__ import annotations

from statistics import median

from .choice_tables import CELLS, best, radii, regret
from .choices import CHOICES, TRIED
from .comparisons import Comparison
from .results import Results

_NEAR = 0.04  # in worst-case loss


def choice_claims(results: Results) -> dict[str, bool]:
    base, noisy, rare, common, agree, alone = (Comparison(results, cell) for cell in CELLS.values())

    def loss(own: Comparison, method: str) -> float:
        return own.value(method, "tv10")

    def near(own: Comparison, choice: str) -> bool:
        return loss(own, choice) < loss(own, best(own)) + _NEAR

    def radius(own: Comparison, choice: str) -> float:
        return median(radii(results, own.cell, choice))

    sentence, prompts, left, dear = (
        "10% may change",
        "target prompts",
        "leave one domain out",
        "validation loss within 5%",
    )
    reach, warm, driven = f"{sentence}, as chi-square", "warm-up to TV .1", "adaptive up to TV .4"
    conflict = (base, noisy, rare, common)
    return {
        "no way is near the best everywhere": min(regret(results, choice) for choice in CHOICES) > _NEAR,
        "of them two are not far": sorted(CHOICES, key=lambda choice: regret(results, choice))[:2] == [left, prompts],
        "large radii are best with a conflict": all(best(own) in ("TV .4", "TV .7") for own in conflict),
        "a small one without": best(agree) in ("TV .02", "TV .05"),
        "none with wrong labels besides": best(alone) == "plain",
        "chi-square at equal reach is ahead of the sentence": all(
            loss(own, reach) < loss(own, sentence) for own in (*conflict, agree)
        ),
        "the sentence is too small for a rare minority": not near(rare, sentence),
        "target prompts come near the best with the conflict": near(base, prompts) and near(noisy, prompts),
        "and hurt where the domains agree": agree.more_loss(prompts).low > 0,
        "they see half of the distance": 0.15 < radius(base, prompts) < 0.25,
        "and less of a short one": radius(common, prompts) < 0.1 and not near(common, prompts),
        "leaving a domain out tells a conflict": radius(base, left) == max(TRIED) and radius(agree, left) == 0.0,
        "budgets are near the best where the domains agree": near(agree, "ess of 80%") and near(agree, dear),
        "and far from it where they do not": not near(base, "ess of 80%") and not near(base, dear),
        "a budget of loss is larger with wrong labels": radius(noisy, dear) > 2 * radius(base, dear),
        "a confidence radius is nearly plain": all(
            0 < -own.more_loss("confidence 95%").mean < 0.06 for own in (base, rare)
        ),
        "a warm-up comes less far": loss(base, warm) > loss(base, sentence),
        "but is ahead where the domains agree": loss(agree, warm) == min(loss(agree, choice) for choice in CHOICES),
        "the driven one is near the best with the conflict": near(base, driven),
        "with noise alone all that were large hurt": all(
            alone.more_loss(choice).low > 0 for choice in (sentence, prompts, left, driven)
        ),
    }
