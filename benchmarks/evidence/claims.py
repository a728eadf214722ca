"""What the sentences of `conclusions.md` say, as conditions on the results."""

from __future__ import annotations

import math

from .choice_claims import choice_claims
from .comparisons import MAJORITY, MINORITY, Comparison, Shifted
from .human_tables import LINEAR as HUMAN
from .human_tables import MLP as HUMAN_MLP
from .known_tables import LINEAR, NOISY
from .methods import TV_RADII
from .results import Cell, Results
from .studies import BASE
from .truth import Truth

CELLS: dict[str, Cell] = {
    "linear": LINEAR,
    "noisy": NOISY,
    "mlp": (BASE, "mlp"),
    "noisy mlp": (NOISY[0], "mlp"),
    "rare": (Truth(share=0.01), "linear"),
    "common": (Truth(share=0.3), "linear"),
    "no conflict": (Truth(conflict=0.0), "linear"),
    "noise alone": (Truth(conflict=0.0, noise=0.2), "linear"),
    "lora": (BASE, "minilm LoRA"),
    "full": (BASE, "minilm full"),
    "tier c": (None, "smollm2 LoRA"),
    "human": HUMAN,
    "longer wins": (None, "none"),
}


def claims(results: Results) -> dict[str, bool]:
    return _of_methods(results) | choice_claims(results)


def _of_methods(results: Results) -> dict[str, bool]:
    linear, noisy, mlp = (Comparison(results, CELLS[name]) for name in ("linear", "noisy", "mlp"))
    lora, full = (Comparison(results, CELLS[name]) for name in ("lora", "full"))
    noisy_mlp, alone = (Comparison(results, CELLS[name]) for name in ("noisy mlp", "noise alone"))
    none, human, human_mlp = (Shifted(results, cell) for cell in (CELLS["no conflict"], HUMAN, HUMAN_MLP))
    tier_c = Shifted(results, CELLS["tier c"])
    sets = [m for m in linear.others if m.startswith(("TV", "chi-square", "KL", "CVaR")) and "domains" not in m]
    small, large, weights, cvar = "chi-square .03", "chi-square 1", "inverse frequency", "CVaR .5"

    def saved(method: str) -> float:
        return -linear.more_loss(method).mean

    def paid(own: Comparison, method: str) -> float:
        return -own.gain(method, MAJORITY).mean

    return {
        "TV .1 helps the minority, costs the majority and lowers the worst case": linear.gain("TV .1", MINORITY).low > 0
        and paid(linear, "TV .1") > 0 > linear.more_loss("TV .1").high,
        "a small radius costs less for what it saves": saved(small) / saved(large)
        > 2 * paid(linear, small) / paid(linear, large),
        "large radii end near no opinion": all(
            linear.value(method, "tv10") > math.log(2) and linear.value(method, "tv10") < math.log(2) + 0.02
            for method in ("TV .4", large)
        ),
        "with the MLP a small radius is nearly free": paid(mlp, "chi-square .1") < 0.01
        and mlp.value("chi-square .1", "loss") < mlp.value("plain", "loss")
        and mlp.value("chi-square .1", "ece") < mlp.value("plain", "ece"),
        "TV .4 is the best set for the worst domain": max(sets, key=lambda m: linear.value(m, "worst")) == "TV .4",
        "inverse frequency is better for it": linear.value(weights, "worst") > linear.value("TV .4", "worst"),
        "and worse for the worst case": linear.value("TV .1", "tv10") < linear.value(weights, "tv10"),
        "noise eats the benefit": -noisy.more_loss("TV .1").low < -linear.more_loss("TV .1").high,
        "noise alone makes every radius hurt": all(
            alone.more_loss(method).low > 0 and paid(alone, method) > 0 for method in TV_RADII
        ),
        "with the MLP noise leaves more of it": noisy_mlp.more_loss("TV .1").mean / mlp.more_loss("TV .1").mean
        > noisy.more_loss("TV .1").mean / linear.more_loss("TV .1").mean,
        "noise raises the price": paid(noisy, cvar) > 2 * paid(linear, cvar),
        "trimming and optimism favour the majority": all(
            noisy.gain(method, MAJORITY).low > 0 > noisy.gain(method, MINORITY).high
            for method in ("DORO .1, CVaR .5", "Dr. DPO 1")
        ),
        "no method beats plain on the shifted sets": not any(
            own.overall(method).low > 0 for own in (human, human_mlp) for method in own.others
        ),
        "the hardest fifth is the best of them": max(human.others, key=lambda m: human.overall(m).mean)
        == "hardest 20% x2",
        "TV .4 hurts there": human.overall("TV .4").high < 0,
        "little to gain without conflict": none.value("plain", "worst") > 0.9
        and none.gain("TV .1", MINORITY).mean < 0.02,
        "a small radius does no harm there": all(none.gain("TV .1", which).mean > 0 for which in (MINORITY, MAJORITY)),
        "weights, trimming and optimism do": all(
            none.gain(method, which).high < 0
            for method in (weights, "DORO .1, CVaR .5", "Dr. DPO 1")
            for which in (MINORITY, MAJORITY)
        ),
        "the MLP serves both better": mlp.value("plain", "worst") > linear.value("plain", "worst"),
        "micro-batches of 1 are plain": abs(linear.gain("TV .1, batch 1", MINORITY).mean) < 0.002,
        "the memory is not": linear.gain("TV .1, memory 1", MINORITY).low > 0.002,
        "LoRA learned the majority's score": lora.accuracy("plain", MAJORITY) > 0.75,
        "with it a small radius is nearly free": lora.more_loss("TV .1").high < 0
        and abs(lora.gain("TV .1", MAJORITY).mean) < 0.01
        and abs(lora.value("TV .1", "loss") - lora.value("plain", "loss")) < 0.01
        and lora.value("TV .1", "ece") < lora.value("plain", "ece"),
        "sets do not serve its minority, weights do": all(
            lora.gain(method, MINORITY).low < 0 for method in ("TV .1", "chi-square .1")
        )
        and lora.gain(weights, MINORITY).low > 0 > lora.gain(weights, MAJORITY).high,
        "nor with all weights of the encoder": full.value("TV .1", "tv10") < full.value("plain", "tv10")
        and all(full.gain("TV .1", which).low < 0 for which in (MINORITY, MAJORITY)),
        "SmolLM2 did not learn the human labels": tier_c.value("plain", "accuracy") < 0.6,
        "with TV .1 it has hardly an opinion": math.log(2) - 0.02 < tier_c.value("TV .1", "tv10") < math.log(2) + 0.02
        and tier_c.more_loss("TV .1").mean < -0.05
        and not tier_c.overall("TV .1").clear,
        "heads hardly learn the human labels": human.value("plain", "accuracy") < 0.55,
        "large radii pull towards a guess": human.on(large, "eval_llmbar").low > 0
        and human.on(large, "eval_safety_xstest").high < 0,
        "the minority prevails in no soft group": max(results.about["minority_by_group"]) < 0.5,
        "groups are no better a trade": all(
            own.accuracy("TV .7, soft prompt groups", MINORITY) < own.accuracy(method, MINORITY) + 0.02
            and own.accuracy("TV .7, soft prompt groups", MAJORITY) < own.accuracy(method, MAJORITY)
            for own, method in ((linear, "TV .2"), (noisy, "TV .05"))
        ),
        "averaging is a little ahead": all(
            own.value("TV .1", "tv10", "average") < min(own.value("TV .1", "tv10", other) for other in ("last", "best"))
            for own in (linear, mlp)
        ),
        "prompt groups do less than TV .1": all(
            own.gain(method, MINORITY).mean < own.gain("TV .1", MINORITY).mean
            for own in (linear, noisy)
            for method in ("TV .1, soft prompt groups", "TV .1, prompt clusters")
        ),
    }
