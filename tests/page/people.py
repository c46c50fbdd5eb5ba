"""Visitors whom nobody is, for the screenshot and for tests of the page."""

import random
import time
from contextlib import closing

import storage

FIRST = [
    "Amara",
    "Bjarne",
    "Chiara",
    "Dilnoza",
    "Emeka",
    "Freya",
    "Goran",
    "Haruka",
    "Inês",
    "João",
    "Kalea",
    "Lars",
    "Mei",
    "Nikhil",
]
FIRST += [
    "Olena",
    "Pedro",
    "Quynh",
    "Rania",
    "Søren",
    "Tamar",
    "Uxía",
    "Viktor",
    "Wanjiru",
    "Ximena",
    "Yusuf",
    "Zoë",
]
LAST = [
    "Abbott",
    "Berg",
    "Castro",
    "Dubois",
    "Eriksen",
    "Ferreira",
    "Gallo",
    "Haddad",
    "Ito",
    "Jansen",
    "Kaya",
    "Lindqvist",
]
LAST += [
    "Moreau",
    "Novak",
    "Okafor",
    "Petrov",
    "Quinn",
    "Rossi",
    "Silva",
    "Tanaka",
    "Ueda",
    "Vargas",
    "Weber",
    "Yilmaz",
]
DEPARTMENTS = ["Support", "Sales", "Billing", ""]
DAY = 86_400_000


def register(path, number=312, now=None):
    """Register so many visitors over the last 30 days; the same ones each time."""
    storage.prepare(str(path))
    chance = random.Random(7)
    now = now or int(time.time() * 1000)
    busy = [
        (day % 7 not in (2, 3) and chance.uniform(4, 10)) or chance.uniform(1, 3)
        for day in range(30)
    ]
    ages = [day * DAY + chance.uniform(0, DAY) for day in chance.choices(range(30), busy, k=number)]
    ages = sorted([*ages, *(60_000 * minutes for minutes in (0.2, 4, 11, 26, 52, 75, 130))])
    with closing(storage.Database(str(path))) as database:
        for age in reversed(ages):
            store = storage.VisitorStore(database, clock=lambda age=age: int(now - age))
            name = f"{chance.choice(FIRST)} {chance.choice(LAST)}"
            given = {
                "name": name,
                "email": f"{name.lower().replace(' ', '.')}@example.com",
                "phone": f"+1 555 01{chance.randrange(100):02}",
                "department": chance.choice(DEPARTMENTS),
                "username": name.split()[0].lower() if chance.random() < 0.4 else "",
            }
            kept = {key: value for key, value in given.items() if value and chance.random() < 0.85}
            fields = [
                {"key": key, "value": value, "overwrite": True}
                for key, value in (
                    ("page", chance.choice(["/pricing", "/docs/install", "/contact"])),
                    ("campaign", chance.choice(["spring", "newsletter"])),
                )
            ]
            store.register(f"token-{chance.getrandbits(96):x}", kept, fields)
