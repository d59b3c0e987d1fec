"""SVG elements as text, and the few scales that charts need."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup, escape

WIDTH = 480  # of every drawing, in its own units


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """An element; `_` in a name stands for `-`, a last one for nothing, None leaves it out."""
    shown = [
        Markup(' {}="{}"').format(Markup(key.strip("_").replace("_", "-")), _text(value))
        for key, value in attributes.items()
        if value is not None
    ]
    inside = Markup("").join(escape(child) for child in children)
    return Markup("<{}{}>{}</{}>").format(
        Markup(name), Markup("").join(shown), inside, Markup(name)
    )


def _text(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def drawing(height: float, label: str, parts: Iterable[Markup]) -> Markup:
    """A picture as wide as its place; `label` is read out in place of it."""
    box = f"0 0 {WIDTH} {_text(float(height))}"
    return tag("svg", *parts, viewBox=box, role="img", aria_label=label)


def words(text: str, x: float, y: float, class_: str = "", anchor: str = "start") -> Markup:
    return tag("text", text, x=x, y=y, class_=class_ or None, text_anchor=anchor)


def title(text: str) -> Markup:
    return tag("title", text)


def path(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A line through points; `d` is closed where it has a class "area"."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    end = "Z" if attributes.get("class_") == "area" else ""
    return tag("path", d=f"M{steps}{end}", **attributes)


@dataclass(frozen=True, slots=True)
class Log:
    """Values between `low` and `high`, both positive, laid out from `begin` to `end`."""

    low: float
    high: float
    begin: float
    end: float

    def __call__(self, value: float) -> float:
        share = (log10(value) - log10(self.low)) / ((log10(self.high) - log10(self.low)) or 1.0)
        return self.begin + min(max(share, 0.0), 1.0) * (self.end - self.begin)

    def ticks(self, steps: Sequence[int] = (1, 3)) -> list[float]:
        """Powers of ten times `steps`, as far as they are inside."""
        powers = range(floor(log10(self.low)) - 1, ceil(log10(self.high)) + 1)
        values = [step * 10.0**power for power in powers for step in steps]
        return [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
