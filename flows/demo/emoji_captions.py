"""Captions for emoji and icons: several phrasings of a name, as a person would type them.

A caption says only what the name, the group or the measured colour of the image says. The same
input always gives the same captions. Reads and writes no files.
"""

import re
from collections import Counter
from collections.abc import Iterable

MAX_PHRASINGS = 10
MIN_PHRASINGS = 6
FILLERS = ("a small picture of", "a drawing of", "an image of")

STYLE_PHRASES = {
    "google": "a Google style {name}",
    "twitter": "a Twitter style {name}",
    "fluent-3d": "a 3D render of {article}",
    "fluent-flat": "a flat drawing of {article}",
    "noto-v1": "an old Google style {name}",
    "emojione": "an EmojiOne style {name}",
    "emojione-v1": "an old EmojiOne style {name}",
    "openmoji": "a drawing of {article} with black outlines",
    "game-icons": "a black silhouette of {article}",
    "lucide": "a black line drawing of {article}",
    "streamline": "a freehand sketch of {article}",
    "flags": "a flat {name}",
}

# Unicode labels that name an idea, and what all vendors draw for them.
DEPICTED = {
    "badminton": "badminton racket and shuttlecock",
    "bowling": "bowling ball and pins",
    "breast-feeding": "woman feeding baby at the breast",
    "brick": "brick wall",
    "construction": "construction barrier",
    "cooking": "frying pan with egg",
    "cricket game": "cricket bat and ball",
    "dashing away": "dash cloud",
    "dizzy": "dizzy star",
    "field hockey": "field hockey stick and ball",
    "foggy": "foggy weather",
    "horse racing": "jockey on a horse",
    "ice hockey": "ice hockey stick and puck",
    "lacrosse": "lacrosse stick",
    "locked": "closed padlock",
    "locked with key": "closed padlock with key",
    "locked with pen": "closed padlock with pen",
    "mate": "mate drink",
    "metro": "metro train",
    "ping pong": "ping pong paddle and ball",
    "rolling on the floor laughing": "laughing face rolling on the floor",
    "star-struck": "star-struck face",
    "station": "train station",
    "tennis": "tennis racket and ball",
    "unlocked": "open padlock",
    "wedding": "wedding chapel",
}

# Word to append to a name, by subcategory, unless the name already ends in one of ENDINGS.
SUFFIXES = {"warning": "sign", "transport-sign": "sign", "math": "sign", "religion": "symbol"}
ENDINGS = ("sign", "symbol", "worship", "menorah", "cross", "bicycles", "room")
SYMBOLS = frozenset(
    ("copyright", "information", "registered", "wireless", "high voltage", "trade mark")
)

# What all emoji of a subcategory show, for subcategories where one phrase fits all.
KINDS = {
    "animal-bird": "a bird",
    "animal-bug": "a small creature",
    "animal-mammal": "an animal",
    "animal-marine": "a sea creature",
    "animal-reptile": "a reptile",
    "cat-face": "a cat",
    "clothing": "clothing",
    "dishware": "tableware",
    "drink": "a drink",
    "food-asian": "Asian food",
    "food-fruit": "a fruit",
    "food-prepared": "a meal",
    "food-sweet": "a sweet",
    "food-vegetable": "a vegetable",
    "geometric": "a shape",
    "hand-fingers-closed": "a hand",
    "hand-fingers-open": "a hand",
    "hand-fingers-partial": "a hand",
    "hand-single-finger": "a hand",
    "lock": "a lock",
    "mail": "mail",
    "monkey-face": "a monkey",
    "musical-instrument": "a musical instrument",
    "person-role": "a person",
    "person-sport": "a person doing sport",
    "place-building": "a building",
    "place-religious": "a religious building",
    "plant-flower": "a flower",
    "time": "time",
    "tool": "a tool",
    "transport-air": "air transport",
    "transport-ground": "transport",
    "transport-water": "water transport",
    "zodiac": "a zodiac sign",
}

# All vendors draw the faces of these subcategories yellow, except names with a word of
# NOT_YELLOW.
YELLOW_FACES = frozenset(
    (
        "face-smiling", "face-affection", "face-tongue", "face-hand", "face-neutral-skeptical",
        "face-sleepy", "face-unwell", "face-hat",
        "face-glasses", "face-concerned",
    )
)  # fmt: skip
NOT_YELLOW = (
    "nauseated",
    "hot face",
    "cold face",
    "vomiting",
    "exploding",
    "clouds",
    "dotted",
    "distorted",
)
COLOUR_WORDS = frozenset(
    (
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
        "pink",
        "brown",
        "black",
        "grey",
        "gray",
        "white",
        "golden",
        "colored",
    )
)

PLURALS = {
    "man": "men",
    "woman": "women",
    "boy": "boys",
    "girl": "girls",
    "adult": "adults",
    "child": "children",
}
NUMBERS = {2: "two", 3: "three", 4: "four"}

SINGULAR_STARTS = frozenset(("person", "man", "woman", "face", "boy", "girl", "child", "jockey"))
SINGULARS_IN_S = frozenset(
    ("bus", "rhinoceros", "moss", "chess", "lens", "canvas", "gas", "minibus", "trolleybus")
)
PLURALS_NOT_IN_S = frozenset(("people", "men", "women", "skis", "teeth", "feet"))
UNCOUNTED = frozenset(
    (
        "bacon", "bread", "broccoli", "butter", "clothing", "customs", "fire", "fog", "food",
        "garlic", "ice", "liquid",
        "luggage", "mail", "milk", "money", "points", "popcorn", "rice", "sake", "salt", "seafood",
        "snow", "soap", "spaghetti", "sushi",
        "thread", "weather", "wood", "yarn", "ZZZ",
    )
)  # fmt: skip
NO_KEYWORDS = frozenset(
    (
        "not",
        "no",
        "what",
        "who",
        "hey",
        "you",
        "feels",
        "where",
        "me",
        "know",
        "yes",
        "ok",
        "this",
        "sir",
        "and",
        "or",
    )
)


def clean_name(label: str, subcategory: str = "") -> str:
    """Turn a CLDR label into a name that a person would say.

    For example `flag: France` to `flag of France`, and `man: beard` to `man with a beard`.
    """
    text = re.sub(r"[“”!]", "", label.replace("’", "'"))
    text = re.sub(r"\s*\(.*?\)", "", text).replace(" & ", " and ")
    if text.startswith(("Tokyo", "mount ")):
        text = text.title()
    head, colon, tail = text.partition(": ")
    if not colon:
        text = DEPICTED.get(text, text)
        if text in SYMBOLS:
            return f"{text} symbol"
        suffix = SUFFIXES.get(subcategory)
        return f"{text} {suffix}" if suffix and not text.endswith(ENDINGS) else text
    members = tail.split(", ")
    if head == "flag":
        return f"flag of {tail}"
    if head == "keycap":
        return f"keycap {tail}"
    if all(member in PLURALS for member in members):
        return f"{head}{ {'kiss': ' between', 'family': ' of'}.get(head, ',') } {counted(members)}"
    if tail == "bald":
        return f"bald {head}"
    return (
        f"{head} facing right"
        if tail == "facing right"
        else f"{head} with {'a ' if tail == 'beard' else ''}{tail}"
    )


def counted(members: list[str]) -> str:
    """Join people and count repeated ones: `man, girl, girl` to `a man and two girls`."""
    words = [
        with_article(who) if n == 1 else f"{NUMBERS[n]} {PLURALS[who]}"
        for who, n in Counter(members).items()
    ]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def with_article(name: str) -> str:
    """Return a name with its English article: `a`, `an`, `the` or none."""
    if name.startswith("flag of ") or name in ("Statue of Liberty", "milky way"):
        return f"the {name}"
    head = re.split(
        r" (?:with|of|in|on|behind|and|at|showing|from|without|over|curving|for|between) ", name
    )[0].split()
    first, last = head[0], head[-1]
    if first in SINGULAR_STARTS:
        return f"a {name}"
    if (
        first in ("no", "input", "shaved")
        or {first, last} & PLURALS_NOT_IN_S
        or last in UNCOUNTED
        or name.endswith(("o'clock", "-thirty"))
    ):
        return name
    is_proper = all(re.match(r"[A-Z][a-z]+\.?$|[A-Z][a-z]$", word) for word in head)
    if is_proper:
        return name
    is_plural = (
        last.endswith("s") and not last.endswith(("ss", "us", "is")) and last not in SINGULARS_IN_S
    )
    if is_plural:
        return name
    return f"{'an' if sounds_like_vowel(first) else 'a'} {name}"


def sounds_like_vowel(word: str) -> bool:
    """Return whether a word starts with a vowel sound and takes `an`.

    For example `an hourglass`, `a unicorn`, `an NG button`, `an x-ray`.
    """
    if word.isupper() and (len(word) == 1 or not set(word) & set("AEIOU") or word == "SOS"):
        return word[0] in "AEFHILMNORSX"
    lower = word.lower()
    if lower.startswith(("hour", "honest", "x-")):
        return True
    return lower[0] in "aeiou" and not re.match(r"uni|eu|one\b|ewe|use|ufo|uk", lower)


def build_phrasings(
    name: str,
    style: str = "",
    tags: tuple[str, ...] = (),
    category: str = "",
    subcategory: str = "",
    colour: str = "",
) -> list[str]:
    """Return 6 to 10 different captions, the clean name first.

    `colour` is the measured main colour of the image, or ""; `tags` are keywords, best first.
    """
    article = with_article(name)
    if name.startswith("flag of "):
        region = name.removeprefix("flag of ")
        phrasings = flag_phrasings(region, is_country=subcategory != "subdivision-flag")
        noun = f"the {region} flag"
    else:
        phrasings = [name, article, *special_phrasings(name, subcategory)]
        phrasings += colour_phrasings(name, category, subcategory, colour)
        noun = article
    phrasings += [f"{noun} {'emoji' if category else 'icon'}", f"an icon of {article}"]
    if style in STYLE_PHRASES:
        phrasings.append(STYLE_PHRASES[style].format(name=name, article=article))
    words = keywords(name, tags)
    if words:
        phrasings.append(f"{name}, {', '.join(words[:2])}")
    phrasings.append(f"a picture of {article}")
    kind = KINDS.get(subcategory)
    if kind and kind.split()[-1] not in name:
        phrasings.append(f"{article}, {kind}")
    if len(words) > 3:
        phrasings.append(f"{name}, {', '.join(words[2:4])}")
    phrasings = list(dict.fromkeys(phrasings))
    fillers = [f"{filler} {article}" for filler in FILLERS]
    phrasings += fillers[: max(0, MIN_PHRASINGS - len(phrasings))]
    if category:
        phrasings[MAX_PHRASINGS - 1 :] = [f"{name}, {category.lower().replace('&', 'and')}"]
    return phrasings[:MAX_PHRASINGS]


def colour_phrasings(name: str, category: str, subcategory: str, colour: str) -> list[str]:
    """Return the name with its colour; nothing for people, flags and names that hold a colour."""
    if is_yellow_face(name, subcategory):
        colour = "yellow"
    if not colour or category in ("People & Body", "Flags"):
        return []
    if COLOUR_WORDS & set(re.split(r"[ -]", name.lower())):
        return []
    return [with_article(f"{colour} {name}")]


def keywords(name: str, tags: Iterable[str]) -> list[str]:
    """Return the tags that are words and not part of the name; none for a flag."""
    lower = name.lower()
    if lower.startswith("flag of "):
        return []
    return [tag for tag in tags if is_word(tag) and tag.lower() not in lower]


def flag_phrasings(region: str, is_country: bool) -> list[str]:
    """Return phrasings for the flag of a region."""
    national = [f"the national flag of {region}"] if is_country else []
    return [
        f"flag of {region}",
        f"the flag of {region}",
        f"the {region} flag",
        f"{region} flag",
        *national,
        "a flag",
        region,
    ]


def special_phrasings(name: str, subcategory: str) -> list[str]:
    """Return further phrasings for digits, clocks, zodiac signs, smileys and flags."""
    if digit := re.fullmatch(r"keycap (\d+)", name):
        return [f"the number {digit[1]}", f"the digit {digit[1]} on a key"]
    if subcategory == "time" and (hour := re.fullmatch(r"(\w+)(?: o'clock|-thirty)", name)):
        return [
            f"a clock showing {name}",
            f"a clock showing half past {hour[1]}" if name.endswith("thirty") else "a clock",
        ]
    if subcategory == "zodiac":
        return [f"the zodiac sign {name}"]
    if subcategory == "face-smiling" and "face" in name:
        return ["a yellow smiling face", "a smiley"]
    if subcategory == "country-flag" or subcategory == "flag":
        return ["a flag"]
    return []


def is_yellow_face(name: str, subcategory: str) -> bool:
    """Return whether an emoji is one of the plain yellow faces."""
    return (
        subcategory in YELLOW_FACES
        and "face" in name
        and not any(word in name for word in NOT_YELLOW)
    )


def is_word(tag: str) -> bool:
    """Return whether a keyword is a usable word rather than a code such as `CN`, `:D` or `4`."""
    return bool(re.fullmatch(r"[a-z][a-z' -]{2,24}", tag)) and tag not in NO_KEYWORDS
