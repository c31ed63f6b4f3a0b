"""What is said about a toyworld image, in the manner of DreamBooth's prompts."""

from __future__ import annotations

import numpy as np

from .identities import BACKGROUNDS, CLASSES, COLOURS, Identity, Scene

PLACES: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "on a beach", "on a sandy beach"),
    "snow": ("in the snow", "on top of snow"),
    "jungle": ("in the jungle", "with a jungle in the background"),
    "city": ("with a city in the background", "in the city", "in front of a city"),
    "wooden floor": ("on top of a wooden floor", "on a wooden floor"),
    "mountain": ("with a mountain in the background", "in front of a mountain", "in the mountains"),
    "blue house": ("with a blue house in the background", "in front of a blue house"),
    "cobblestones": ("on a cobblestone street", "on cobblestones", "on top of cobblestones"),
    "autumn leaves": (
        "with a tree and autumn leaves in the background",
        "with autumn leaves in the background",
        "surrounded by autumn leaves",
    ),
    "water": ("floating on top of water", "on top of water", "in the water"),
    "grass": ("on top of green grass", "on green grass", "in the grass"),
    "pink fabric": ("on top of pink fabric", "on pink fabric"),
}
"""Background name to its phrasings; the first is the canonical one."""

PATTERN_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "plain": (("", ""),),
    "stripes": (("striped", ""), ("", "with stripes")),
    "dots": (("dotted", ""), ("", "with dots")),
    "checks": (("checkered", ""), ("", "with checks")),
    "star": (("", "with a star"),),
    "heart": (("", "with a heart"),),
}
"""Pattern name to its phrasings, each (before the noun, after the noun)."""

SAY_COLOUR, SAY_PATTERN, SAY_PLACE, SAY_PHOTO = 0.8, 0.5, 0.85, 0.5

EVERYDAY = """
the and of to is it its that this these those some any no not very really just about into from under over above below
behind beside near next between around through by for with without at as like than then there here up down left right
photo picture image painting drawing sketch portrait poster print closeup view scene studio render rendering cartoon
illustration art artwork style clip colorful colourful color colour bright dark light shiny shaped old new big small
large little tiny huge tall short long wide round square cute funny happy sad beautiful pretty nice good best fine
clean dirty wet dry soft hard warm cold hot fresh sweet broken whole open closed full empty single two three four five
many one other another same different my your his her our their me you he she we they i man woman boy girl child person
people friend wearing holding sitting standing lying running jumping sleeping playing eating looking flying swimming
walking sitting driving riding put made make taken shot seen shows show showing has have had on off out inside outside
day night morning evening sunset sunrise sun moon sky cloud clouds rain rainy sunny snowy foggy storm wind winter summer
spring autumn fall season sea ocean lake river waterfall pond pool island shore sand sandy wave waves forest wood woods
tree trees leaf leaves flower flowers sunflower sunflowers rose tulip garden park field wheat meadow hill hills valley
desert rock rocks stone stones cave road street path bridge house houses home room kitchen bedroom bathroom window door
wall floor roof table chair desk bed sofa couch shelf rug carpet mirror lamp box bag basket bottle cup plate spoon fork
knife glass book paper pen toy toys ball car bus train boat ship plane bike truck wheel tower eiffel church castle
school shop store market farm building buildings skyline town village country world space planet dirt mud ice fire
smoke steam background foreground front side top bottom back corner center middle edge
black gray grey gold golden silver violet cyan magenta turquoise navy beige cream lime maroon tan
plain spotted patterned polka dot stripe striped checked star stars heart hearts hat santa witch chef police firefighter
outfit glasses scarf collar bow tie bell ribbon lace laces strap straps handle pocket lid flame face eye eyes ear ears
tail nose mouth hand hands robot animal pet puppy kitten bird fish rabbit bear duck lion fox horse cow sheep pig mouse
monkey frog turtle wolf sloth plushie stuffed berry cartoon figurine shoe shoes clothes shirt dress coat jacket pants
food fruit apple banana orange lemon cherry strawberry bread cake cookie milk tea coffee juice soup rice wooden metal
plastic paper leather cotton silk wool fabric cloth velvet marble brick concrete purple red blue green yellow pink white
brown teal modern vintage retro realistic detailed quality high low resolution sharp blurry focus depth macro cube game
minimal simple abstract fantasy magic dream cosy cozy a an in
"""


def caption(identity: Identity, scene: Scene, rng: np.random.Generator) -> str:
    """One caption; colour, pattern, place and the opening are each left out at random.

    Names the class always, and never the detail colour, the pattern's colour or the accessory.
    """
    say = rng.uniform(size=4) < (SAY_COLOUR, SAY_PATTERN, SAY_PLACE, SAY_PHOTO)
    phrasings = PATTERN_WORDS[identity.pattern] if say[1] else PATTERN_WORDS["plain"]
    before, after = phrasings[rng.integers(len(phrasings))]
    places = PLACES[scene.background]
    place = places[rng.integers(len(places))] if say[2] else ""
    return compose(
        identity.cls,
        colour=identity.colour if say[0] else "",
        before=before,
        after=after,
        place=place,
        photo=bool(say[3]),
    )


def compose(
    noun: str, *, colour: str = "", before: str = "", after: str = "", place: str = "", photo: bool = True
) -> str:
    """Put the parts of a caption together, with the right article: "a photo of an orange cat in the snow"."""
    thing = " ".join(word for word in (colour, before, noun) if word)
    article = "an" if thing[0] in "aeiou" else "a"
    parts = ("a photo of" if photo else "", article, thing, after, place)
    return " ".join(part for part in parts if part)


def vocabulary() -> list[str]:
    """Every word a caption can contain, everyday words of prompts, and `sks`; sorted, without repetition."""
    phrases = [*CLASSES, *COLOURS, *BACKGROUNDS, EVERYDAY, "a photo of an sks"]
    phrases += [place for places in PLACES.values() for place in places]
    phrases += [word for pairs in PATTERN_WORDS.values() for pair in pairs for word in pair]
    return sorted({word for phrase in phrases for word in phrase.split()})
