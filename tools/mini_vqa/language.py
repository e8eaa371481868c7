"""Words alone: copying, options, either-or, opposites, what belongs together, numbers."""

from functools import cache
from random import Random

from .canvas import COLOURS, SHAPES
from .drawings import WEIGHTS, drawings
from .plain import READ, THINGS
from .questions import BY_LETTER, LETTERS, PLACES, Picture, one_of, options

# What a language model would know of the words that the five tasks use.
BELONGS = {
    "river": "water", "lake": "water", "forest": "trees", "farmland": "fields", "city": "buildings", "desert": "sand",
    "building": "house", "road": "cars", "roof": "house", "bridge": "river", "map": "land", "satellite": "space",
    "lesion": "disease", "lymphocyte": "cell", "neutrophil": "cell", "platelet": "cell", "tissue": "cells",
    "microscope": "cells", "stain": "color", "nucleus": "cell", "traffic light": "street", "pedestrian": "person",
    "lane": "road", "vehicle": "car", "sign": "street", "yield": "sign", "speed limit": "sign", "acute": "angle",
    "obtuse": "angle", "magnet": "iron", "clockwise": "turn", "circuit": "electricity", "lamp": "light",
    "battery": "electricity", "gear": "wheel", "solid": "matter", "liquid": "matter", "gas": "matter",
    "lever": "weight",
    "revenue": "money", "profit": "money", "trend": "chart", "quarter": "year", "stock": "money", "slice": "pie",
}  # fmt: skip
OPPOSITES = {
    "up": "down", "left": "right", "top": "bottom", "above": "below", "rising": "falling", "highest": "lowest",
    "stop": "go", "normal": "abnormal", "attract": "repel", "open": "closed", "clockwise": "counterclockwise",
    "acute": "obtuse", "on": "off", "larger": "smaller", "more": "fewer", "first": "last", "yes": "no", "near": "far",
    "horizontal": "vertical", "day": "night", "profit": "loss", "red": "green", "hot": "cold",
}  # fmt: skip
OTHER = [
    "second",
    "third",
    "fourth",
    "middle",
    "same",
    "limit",
    "flat",
    "parasite",
    "ring",
    "balanced",
    "tilted",
    "table",
    "pie",
    "chart",
    "value",
    "row",
]


@cache
def vocabulary() -> tuple[str, ...]:
    """Return every word and name that is used anywhere."""
    words = {*BELONGS, *BELONGS.values(), *OPPOSITES, *OPPOSITES.values(), *OTHER, *COLOURS, *SHAPES, *PLACES, *READ}
    names = {label for task in WEIGHTS for label in drawings(task, "train")}
    return tuple(sorted(words | names | set(THINGS) | {str(number) for number in range(100)}))


def _some(rng: Random, number: int) -> list[str]:
    """Return so many words: colours, shapes and places half of the time."""
    return rng.sample((*COLOURS, *SHAPES, *PLACES) if rng.random() < 0.5 else vocabulary(), number)


def words(rng: Random) -> Picture:
    """Return questions that need no image."""
    if rng.random() < 0.4:
        return drill(rng)
    picture = Picture(None, key=("words",))
    chosen = _some(rng, 4)
    picture.ask("copy", rng.choice(("repeat: {}", "say {}", "repeat the word {}")).format(chosen[0]), chosen[0])
    listed = " ".join(f"{letter}. {word}" for letter, word in zip(LETTERS, chosen, strict=True))
    i = rng.randrange(4)
    picture.ask("copy option", f"{rng.choice(('which option is', 'what is option'))} {LETTERS[i]}? {listed}", chosen[i])
    i = rng.randrange(4)
    picture.ask("find option", f"which option is {chosen[i]}? {listed} {BY_LETTER}", LETTERS[i])
    first, second = chosen[:2]
    answer = rng.choice((first, second))
    text = f"the answer is {answer}. is it {first} or {second}?"
    picture.ask("copy or", text, answer)
    asked = answer if rng.random() < 0.5 else chosen[2]
    picture.ask("copy yes/no", f"the word is {answer}. is it {asked}?", "yes" if asked == answer else "no")
    belonging = rng.choice(list(BELONGS))
    text = rng.choice(("what belongs to {}?", "what does {} have to do with?")).format(belonging)
    known = rng.sample(sorted(set(BELONGS.values())), 4)
    picture.ask("belongs", text, BELONGS[belonging])
    picture.ask("belongs or", one_of(rng, text, BELONGS[belonging], known), BELONGS[belonging])
    picture.ask("belongs option", *options(rng, text, BELONGS[belonging], known))
    pair = list(rng.choice(list(OPPOSITES.items())))
    rng.shuffle(pair)
    text = f"what is the opposite of {pair[0]}?"
    picture.ask("opposite", text, pair[1])
    picture.ask("opposite option", *options(rng, text, pair[1], rng.sample(sorted(OPPOSITES), 4)))
    x, y = rng.sample(range(10), 2)
    picture.ask("larger number", f"{rng.choice(('which number is larger', 'which is higher'))}, {x} or {y}?", max(x, y))
    picture.ask("sum", f"what is {x} plus {y}?", x + y)
    _facts(rng, picture, chosen)
    return picture


def drill(rng: Random) -> Picture:
    """Return questions that are answered by looking up many things that were said: what attention has to learn first.

    Answers are long, so that each question has several chances to be learned from; the short ones come of it.
    """
    picture, number = Picture(None, key=("drill",)), rng.randint(4, 9)
    chosen = _some(rng, number)
    picture.ask("repeat", f"repeat: {' '.join(chosen)}", " ".join(chosen))
    picture.ask("repeat", f"repeat backwards: {' '.join(chosen[:4])}", " ".join(reversed(chosen[:4])))
    few = chosen[:4]
    listed = " ".join(f"{letter}. {word}" for letter, word in zip(LETTERS, few, strict=False))
    order = rng.sample(range(len(few)), len(few))
    letters = " ".join(LETTERS[i] for i in order)
    picture.ask("options of letters", f"which options are {letters}? {listed}", ", ".join(few[i] for i in order))
    asked = ", ".join(few[i] for i in order)
    picture.ask("letters of options", f"which options are {asked}? {listed}", letters)
    colours = rng.sample(list(COLOURS), len(few))
    said = " ".join(f"{name} is {colour}." for name, colour in zip(few, colours, strict=True))
    picture.ask("facts", f"{said} what colors are {asked}?", ", ".join(colours[i] for i in order))
    asked = ", ".join(colours[i] for i in order)
    picture.ask("facts", f"{said} what are {asked}?", ", ".join(few[i] for i in order))
    told = [few[i] if rng.random() < 0.5 else rng.choice(vocabulary()) for i in order]
    answer = ", ".join("yes" if one in few else "no" for one in told)
    picture.ask("are they there", f"the words are {' '.join(few)}. is there {', '.join(told)}?", answer)
    other = [colours[i] if rng.random() < 0.5 else rng.choice(list(COLOURS)) for i in order]
    asked = ", ".join(f"{few[i]} {colour}" for i, colour in zip(order, other, strict=True))
    answer = ", ".join("yes" if colours[i] == colour else "no" for i, colour in zip(order, other, strict=True))
    picture.ask("are they so", f"{said} is {asked}?", answer)
    return picture


def board(rng: Random) -> Picture:
    """Return a list of options or facts that stands in place of the image, and what is looked up in it, many times.

    That attention finds a word, and then what stands beside it, is what all letters and all yes and no rest on. It
    starts only where there is much of it, and where each question has one answer.
    """
    number = rng.randint(3, 6)
    heads, bodies = list(LETTERS + "ef")[:number], _some(rng, number)
    kind = rng.choice(("option", "option", "fact"))
    if kind == "fact":
        heads, bodies = rng.sample(vocabulary(), number), rng.sample(list(COLOURS), number)
        said = [f"{head} is {body}." for head, body in zip(heads, bodies, strict=True)]
    else:
        said = [f"{head}. {body}" for head, body in zip(heads, bodies, strict=True)]
    picture = Picture(None, key=("board",), description=" ".join(said))
    absent = rng.choice([word for word in (COLOURS if kind == "fact" else vocabulary()) if word not in bodies])
    for head, body in zip(heads, bodies, strict=True):
        ways = ("what color is {}?", "which color has {}?") if kind == "fact" else ("what is option {}?", "option {}?")
        picture.ask(f"{kind} body", rng.choice(ways).format(head), body)
        ways = ("what is {}?", "what has the color {}?") if kind == "fact" else ("which option is {}?", "{}?")
        picture.ask(f"{kind} head", rng.choice(ways).format(body), head)
        other = body if rng.random() < 0.5 else rng.choice([one for one in bodies if one != body])
        asked = f"is {head} {other}?" if kind == "fact" else f"is option {head} {other}?"
        picture.ask(f"{kind} yes/no", asked, "yes" if other == body else "no")
        other = body if rng.random() < 0.5 else absent
        picture.ask(f"{kind} exists", f"is there {other}?", "yes" if other == body else "no")
    picture.told = tuple(dict.fromkeys(question.kind for question in picture.questions))
    return picture


def _facts(rng: Random, picture: Picture, names: list[str]) -> None:
    """Ask for what is said of two or three things: the same as looking, in words."""
    colours = rng.sample(list(COLOURS), 3)
    number = rng.choice((2, 3))
    said = " ".join(f"{name} is {colour}." for name, colour in zip(names[:number], colours, strict=False))
    i = rng.randrange(number)
    text = f"{said} what color is {names[i]}?"
    picture.ask("fact", text, colours[i])
    picture.ask("fact option", *options(rng, text, colours[i], colours))
    asked = colours[i] if rng.random() < 0.5 else colours[(i + 1) % number]
    picture.ask("fact yes/no", f"{said} is {names[i]} {asked}?", "yes" if asked == colours[i] else "no")
    picture.ask("fact name", f"{said} what is {colours[i]}?", names[i])
