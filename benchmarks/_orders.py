"""A small task to learn: a spoken order becomes a record. Generated from a seed, so that nothing is stored."""

from __future__ import annotations

import json
import random

_COUNTS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
_SIZES = ("small", "medium", "large")
_ITEMS = ("pizza", "salad", "burger", "soup", "coffee", "sandwich", "pasta", "curry")
_NAMES = ("Anna", "Ben", "Chloe", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Kate", "Liam")
_FORMS = (
    "{name} would like {count} {size} {items} at {hour} {half}.",
    "Please bring {count} {size} {items} for {name}, we eat at {hour} {half}.",
    "Hi, it's {name}. Can I get {count} {size} {items}? I come by at {hour} {half}.",
    "At {hour} {half} there will be {name} asking for {count} {items}, {size} please.",
)


def orders(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different orders as {"prompt": ..., "completion": ...}."""
    rng = random.Random(seed)
    made: dict[str, str] = {}
    while len(made) < count:
        word, size, item = rng.choice(list(_COUNTS)), rng.choice(_SIZES), rng.choice(_ITEMS)
        name, hour, half = rng.choice(_NAMES), rng.randint(1, 11), rng.choice(("am", "pm"))
        items = item if word == "one" else item + ("es" if item.endswith("ch") else "s")
        text = rng.choice(_FORMS).format(name=name, count=word, size=size, items=items, hour=hour, half=half)
        record = {
            "item": item, "size": size, "count": _COUNTS[word], "name": name,
            "time": f"{hour + 12 * (half == 'pm'):02d}:00",
        }  # fmt: skip
        made[text] = json.dumps(record)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in made.items()]
