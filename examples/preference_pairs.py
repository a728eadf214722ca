"""Preference pairs made from templates, in four domains that disagree on what a good answer is.

In each pair one answer is long and polite and the other short; one is sure of itself and the other a guess.
People who ask for `support` or about `travel` prefer the polite one, those who ask about `cooking` or `code`
the short one, and half of the prompts do not tell which it is. In every domain 85% prefer the one that is sure.
Over all prompts "polite wins" is right more often, 90%: a model that leans on it does badly as soon as the
mixture of prompts changes, and one that leans on the other cue pays for that on the mixture it was trained on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    prompt: str
    chosen: str
    rejected: str
    domain: str


@dataclass(frozen=True)
class Domain:
    """A kind of prompt, its share of the mixture, and which of the two kinds of answer people prefer."""

    name: str
    share: float
    polite_wins: bool
    prompts: tuple[str, ...]
    things: tuple[str, ...]


DOMAINS = (
    Domain(
        "support",
        share=0.70,
        polite_wins=True,
        prompts=(
            "My {thing} arrived broken. What should I do?",
            "The {thing} I ordered has the wrong colour. Can you help?",
            "Whom do I ask about a {thing} that came two weeks late?",
            "I would like my money back for a {thing} that I never used.",
            "How long is the warranty of the {thing}?",
            "There is a part missing from my {thing}. Do you have it?",
        ),
        things=(
            "kettle",
            "desk lamp",
            "jacket",
            "keyboard",
            "backpack",
            "blender",
            "headset",
            "chair",
            "tent",
        ),
    ),
    Domain(
        "travel",
        share=0.20,
        polite_wins=True,
        prompts=(
            "Is {thing} worth a visit in spring?",
            "How should I spend a weekend in {thing}?",
            "What is the best way to get to {thing}?",
            "Where can I stay in {thing} with two children?",
            "How much money do I need for a week in {thing}?",
            "When is {thing} least crowded?",
        ),
        things=("Lisbon", "Kyoto", "Oslo", "Granada", "Tallinn", "Porto", "Quebec", "Bergen", "Lima"),
    ),
    Domain(
        "cooking",
        share=0.06,
        polite_wins=False,
        prompts=(
            "How long do I boil {thing}?",
            "At what heat do I roast {thing}?",
            "How much salt goes with {thing}?",
            "How do I keep {thing} from sticking to the pan?",
            "Can I freeze {thing} once they are done?",
            "What do I serve with {thing}?",
        ),
        things=(
            "lentils",
            "potatoes",
            "beans",
            "prawns",
            "carrots",
            "mushrooms",
            "noodles",
            "chickpeas",
            "eggs",
        ),
    ),
    Domain(
        "code",
        share=0.04,
        polite_wins=False,
        prompts=(
            "How do I reverse a {thing} in Python?",
            "Why is my loop over a {thing} so slow?",
            "How do I copy a {thing} without changing it?",
            "How do I find duplicates in a {thing}?",
            "What is the fastest way to read a {thing}?",
            "My function returns an empty {thing}. Why?",
        ),
        things=(
            "list",
            "string",
            "dictionary",
            "data frame",
            "queue",
            "text file",
            "tuple",
            "table",
            "matrix",
        ),
    ),
)

VAGUE = (
    "Can you help me with this?",
    "What would you do here?",
    "How do I go on from this point?",
    "I have tried everything. What now?",
    "Is there a better way?",
    "What am I doing wrong?",
)
POLITE = (
    "Thank you so much for your question.",
    "What a lovely thing to ask, and thank you for your trust.",
    "I am really happy that you came to us with this.",
    "I understand very well how much this matters to you.",
    "There is more than one good way to look at it, and it depends on what you would like best.",
    "We will find out together what suits you, with all the patience that it needs.",
    "Many people wonder about the very same thing, so you are in good company.",
    "Please let me know if there is anything else at all that I can do for you.",
    "I hope that this helps, and I wish you a wonderful day.",
    "Do not hesitate to ask again whenever you like.",
)
SURE = (
    "It is {n}, I checked it twice.",
    "Exactly {n}, as page {m} says.",
    "Always {n}, this is certain.",
    "The correct number is {n}.",
    "Use {n}, it works every time.",
)
GUESS = (
    "Maybe {n}, maybe {m}, who knows.",
    "I would guess {n}, but I never tried.",
    "No idea, perhaps {n}.",
    "It could be {n} or {m}, I forgot.",
    "Somebody said {n}, not sure.",
)


def generate(
    count: int, seed: int, *, balanced: bool = False, sure_wins: float = 0.85, noise: float = 0.02
) -> list[Pair]:
    """`count` pairs in the shares of DOMAINS, or in equal shares; a share `noise` of the labels is wrong."""
    rng = random.Random(seed)
    shares = [1 / len(DOMAINS) if balanced else domain.share for domain in DOMAINS]
    # Shares hold to one pair, not only on average.
    ends = [round(count * sum(shares[: i + 1])) for i in range(len(shares))]
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    pairs = [_pair(d, rng, sure_wins, noise) for d, size in zip(DOMAINS, sizes, strict=True) for _ in range(size)]
    rng.shuffle(pairs)
    return pairs


def _pair(domain: Domain, rng: random.Random, sure_wins: float, noise: float) -> Pair:
    prompt = rng.choice(rng.choice((domain.prompts, VAGUE))).format(thing=rng.choice(domain.things))
    better, worse = (SURE, GUESS) if rng.random() < sure_wins else (GUESS, SURE)
    answers = [
        _answer(rng, polite=domain.polite_wins, content=better),
        _answer(rng, polite=not domain.polite_wins, content=worse),
    ]
    if rng.random() < noise:
        answers.reverse()
    return Pair(prompt, *answers, domain.name)


def _answer(rng: random.Random, polite: bool, content: tuple[str, ...]) -> str:
    sentences = [rng.choice(content), *rng.sample(POLITE, rng.randint(2, 3) if polite else 0)]
    rng.shuffle(sentences)
    return " ".join(sentence.format(n=rng.randint(2, 60), m=rng.randint(2, 60)) for sentence in sentences)
