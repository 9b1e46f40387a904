"""Captions of the mini world: a few sentences, 20–60 words, that name biome, weather and the car's colour.

The wording varies and the parts change places, so that a text encoder's output is not one fixed string with three
holes in it; the vocabulary stays small enough that a tokenizer trained on a few hundred captions knows every word.
"""

from __future__ import annotations

import numpy as np

BIOME_WORDS = {
    "desert": [
        "a wide sandy desert with red mesas",
        "a dry desert of warm sand",
        "an empty desert below table mountains",
    ],
    "grass": [
        "green grassland with round hills",
        "a calm green meadow of short grass",
        "rolling grass country with lone trees",
    ],
    "snow": [
        "a white snow field with dark firs",
        "a frozen plain covered in snow",
        "a snow landscape below pale mountains",
    ],
    "city": ["a night city of lit towers", "a dark city at night", "the edge of a city at night with glowing windows"],
    "forest": [
        "an autumn forest clearing with orange trees",
        "a forest in red and gold leaves",
        "a forest plain full of trees",
    ],
    "coast": ["a wide coast beside a blue sea", "a sandy coast with palms", "the coast, with islands on the sea"],
}
WEATHER_WORDS = {
    "clear": ["under a clear sky", "in clear weather", "with a clear and quiet sky"],
    "clouds": ["under grey clouds", "below a sky full of clouds", "in dull weather with low clouds"],
    "rain": ["in steady rain", "while rain is falling", "through light rain on a wet road"],
    "fog": ["in thick fog", "through pale fog", "with fog hiding the distance"],
    "sunset": ["at sunset", "in the warm light of sunset", "under a glowing sunset sky"],
}
OPENINGS = [
    "A {color} car drives through {biome} {weather}.",
    "{weather}, a {color} car crosses {biome}.",
    "Driving {weather}: a {color} car in {biome}.",
    "Seen from behind, a {color} car moves across {biome} {weather}.",
    "This is {biome} {weather}, and a {color} car is on its way.",
    "We follow a {color} car over {biome} {weather}.",
]
VIEWS = [
    "The camera follows closely behind and above the car.",
    "The view is from behind, as in a driving game.",
    "The camera stays behind the car and turns with it.",
    "A third person view keeps the car in the lower middle of the picture.",
]
ROADS = [
    "Roads with striped kerbs cross the open ground.",
    "The grey road has a dashed line and kerbs of two colors.",
    "Striped kerbs line the road on both sides.",
    "",
]
ENDINGS = [
    "Landmarks on the horizon slide past when the car turns.",
    "The horizon is far away and the scene is calm.",
    "Brake lights glow whenever the car slows down.",
    "The ground flows by as the car gains speed.",
    "",
]
COLORS = ("red", "blue", "yellow", "white", "green", "orange", "purple", "black")


def make_caption(biome: str, weather: str, color: str, rng: np.random.Generator, kerbs: bool = True) -> str:
    """One caption; `biome`, `weather` and `color` are keys of BIOME_WORDS and WEATHER_WORDS and one of COLORS.

    Without `kerbs` it does not speak of the road.
    """

    def pick(choices: list[str]) -> str:
        return choices[rng.integers(len(choices))]

    opening = pick(OPENINGS).format(biome=pick(BIOME_WORDS[biome]), weather=pick(WEATHER_WORDS[weather]), color=color)
    middle = [pick(VIEWS), pick(ROADS) if kerbs else ""]
    if rng.uniform() < 0.5:
        middle.reverse()
    # At most three sentences keep a caption under 50 words, which is what 64 tokens hold.
    sentences = [opening, *[sentence for sentence in [*middle, pick(ENDINGS)] if sentence][:2]]
    caption = " ".join(sentences)
    return caption[0].upper() + caption[1:]
