"""Charts and tables: bars with an axis, lines, pies, tables of numbers."""

from random import Random

from mini_vqa.canvas import COLOURS, FONTS, Canvas, Colour, vary
from mini_vqa.questions import Picture, one_of

NAMES = ("red", "green", "blue", "orange", "purple", "yellow", "cyan")
TYPES = ("bar", "line", "pie", "table")


def chart(rng: Random) -> Picture:
    """Return a chart or a table with its questions."""
    dark = rng.random() < 0.25
    canvas = Canvas((28, 30, 40) if dark else (255, 255, 255))
    ink = (225, 225, 225) if dark else (40, 40, 40)
    kind = rng.choice(("bar", "bar", "line", "pie", "table"))
    picture = {"bar": _bars, "line": _line, "pie": _pie, "table": _table}[kind](rng, canvas, ink)
    picture.image = canvas.finished()
    picture.ask("type", one_of(rng, "which type of chart is this?", kind, TYPES), kind)
    return picture


def _bars(rng: Random, canvas: Canvas, ink: Colour) -> Picture:
    number = rng.randint(3, 5)
    values, names = rng.sample(range(1, 10), number), rng.sample(NAMES, number)
    for value in range(0, 10, 3):
        canvas.line([(13, 88 - value * 8.6), (94, 88 - value * 8.6)], (140, 140, 140), 0.5)
        canvas.text(6, 88 - value * 8.6, str(value), ink, size=11)
    wide = 78 / number
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        x = 15 + i * wide
        canvas.box(x, 88 - value * 8.6, x + wide * 0.7, 88, vary(rng, COLOURS[name], 8))
    canvas.line([(13, 4), (13, 88), (94, 88)], ink, 1)
    high, low = names[values.index(max(values))], names[values.index(min(values))]
    i, j = rng.sample(range(number), 2)
    picture = Picture(None, key=("bar", number, high, low, values[i], names[i]))
    picture.ask("highest", rng.choice(("which bar is the highest?", "what color is the highest bar?")), high)
    picture.ask("lowest", rng.choice(("which bar is the lowest?", "what color is the lowest bar?")), low)
    picture.ask("bars", rng.choice(("how many bars are there?", "count the bars.")), number)
    picture.ask("value", f"what is the value of the {names[i]} bar?", values[i])
    text = f"is the {names[i]} bar higher than the {names[j]} bar?"
    picture.ask("compare", text, "yes" if values[i] > values[j] else "no")
    if number == 4:
        ways = ("in which quarter was the revenue highest?", "which quarter had the highest revenue?")
        picture.ask("quarter", rng.choice(ways), f"q{values.index(max(values)) + 1}")
    return picture


def _line(rng: Random, canvas: Canvas, ink: Colour) -> Picture:
    trend, name = rng.choice(("rising", "falling", "flat")), rng.choice(NAMES)
    slope = {"rising": 1, "falling": -1, "flat": 0}[trend] * rng.uniform(4.5, 8)
    start = {"rising": 76.0, "falling": 22.0, "flat": rng.uniform(30, 70)}[trend]
    points = [(16 + i * 11, min(86.0, max(6.0, start - slope * i + rng.uniform(-4, 4)))) for i in range(8)]
    canvas.line([(13, 4), (13, 88), (94, 88)], ink, 1)
    canvas.line(points, COLOURS[name], 2)
    for x, y in points:
        canvas.disc(x, y, 2.2, COLOURS[name])
    picture = Picture(None, key=("line", name, trend, int(points[3][1] / 4), int(points[5][1] / 4)))
    ways = ("what is the trend of the stock?", "is the trend rising, falling or flat?")
    picture.ask("trend", rng.choice(ways), trend)
    result = {"rising": "profit", "falling": "loss", "flat": "neither"}[trend]
    ways = ("did the stock make a profit or a loss, or neither?", "profit, loss or neither?")
    picture.ask("profit", rng.choice(ways), result)
    picture.ask("line color", "what color is the line?", name)
    return picture


def _pie(rng: Random, canvas: Canvas, ink: Colour) -> Picture:
    number = rng.randint(3, 4)
    names = rng.sample(NAMES, number)
    shares = rng.sample({3: (55, 27, 18), 4: (46, 26, 17, 11)}[number], number)
    start, x, y = rng.uniform(0, 360), 48 + rng.uniform(-6, 6), 48 + rng.uniform(-6, 6)
    for share, name in zip(shares, names, strict=True):
        canvas.pie(x, y, 38, start, start + 3.6 * share, vary(rng, COLOURS[name], 8))
        start += 3.6 * share
    large, small = names[shares.index(max(shares))], names[shares.index(min(shares))]
    picture = Picture(None, key=("pie", *sorted(names), large, small))
    picture.ask("largest slice", rng.choice(("which slice is the largest?", "what color is the largest slice?")), large)
    picture.ask(
        "smallest slice", rng.choice(("which slice is the smallest?", "what color is the smallest slice?")), small
    )
    picture.ask("slices", rng.choice(("how many slices are there?", "count the slices.")), number)
    text = rng.choice(("is the largest share more than half?", "is one slice more than half of the pie?"))
    picture.ask("half", text, "yes" if max(shares) > 50 else "no")
    return picture


def _table(rng: Random, canvas: Canvas, ink: Colour) -> Picture:
    values, names = rng.sample(range(10, 100), 3), "abc"
    for i in range(4):
        canvas.line([(6, 8 + i * 27), (90, 8 + i * 27)], ink, 1)
    for x in (6, 38, 90):
        canvas.line([(x, 8), (x, 89)], ink, 1)
    for i, value in enumerate(values):
        canvas.text(22, 21.5 + i * 27, names[i].upper(), ink, size=16, face=FONTS[1])
        canvas.text(64, 21.5 + i * 27, str(value), ink, size=16, face=FONTS[1])
    i, j = rng.randrange(3), values.index(max(values))
    picture = Picture(None, key=("table", i, values[i], j))
    picture.ask("cell", rng.choice(("what is the value of {}?", "which value has row {}?")).format(names[i]), values[i])
    ways = ("which row has the highest value?", "which letter has the highest value?")
    picture.ask("highest row", rng.choice(ways), names[j])
    return picture
