"""Solved problems that the worker is shown before its own: texts, solution steps, results.

They were written for this project. `common.prompts` makes the few-shot turns of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate

from common.problems.generated import Shares


def worked_answer(*steps: str, number: int) -> str:
    """A solution: one step per line, then the JSON line that the worker's instructions ask for."""
    return "\n".join([*steps, json.dumps({"final_answer": number})])


# Two problems, and the steps of their solutions.
BAKER = (
    "A baker fills 6 trays with 12 rolls each. He sells 44 rolls in the morning and half of the rest in the afternoon. "
    "How many rolls are left?"
)
BAKER_STEPS = (
    "He bakes 6 * 12 = 72 rolls.",
    "After the morning 72 - 44 = 28 rolls are left.",
    "In the afternoon he sells 28 / 2 = 14 rolls.",
    "So 28 - 14 = 14 rolls are left.",
)
BIKE = "Ida saves $15 a week for 8 weeks. A bike costs $200, and the shop takes 10% off. How much is she short of?"
BIKE_STEPS = (
    "She saves 15 * 8 = 120 dollars.",
    "The discount is 200 * 10 / 100 = 20 dollars.",
    "The bike costs 200 - 20 = 180 dollars.",
    "She is short of 180 - 120 = 60 dollars.",
)

# Parts of these two problems, and their solutions.
BAKED = ("How many rolls does he bake?", worked_answer(*BAKER_STEPS[:1], number=72))
MORNING = ("How many rolls are left after the morning?", worked_answer(*BAKER_STEPS[:2], number=28))
SAVED = ("How much does she save?", worked_answer(*BIKE_STEPS[:1], number=120))
PRICE = ("What does the bike cost after the discount?", worked_answer(*BIKE_STEPS[1:3], number=180))

# Problems for composed questions: text, steps, result. Each has two or three steps. After examples with only one step,
# a small model leaves out steps of its own solutions.
Solved = tuple[str, tuple[str, ...], int]
SOLVED: tuple[Solved, ...] = (
    (
        "A tray holds 6 muffins. Eva bakes 4 trays and gives away 9 muffins. How many muffins has she left?",
        ("She bakes 4 * 6 = 24 muffins.", "She has 24 - 9 = 15 muffins left."),
        15,
    ),
    (
        "Finn has 30 marbles. He gives 12 to his sister and then buys two bags of 5. How many has he now?",
        (
            "After giving some away he has 30 - 12 = 18 marbles.",
            "The bags hold 2 * 5 = 10 marbles.",
            "Now he has 18 + 10 = 28 marbles.",
        ),
        28,
    ),
    (
        "A ticket costs $8 and a drink $3. What do both cost for 5 people?",
        ("One person pays 8 + 3 = 11 dollars.", "Five people pay 5 * 11 = 55 dollars."),
        55,
    ),
    (
        "A book has 50 pages. Lea reads 7 pages an hour and has read for 3 hours. How many pages are left?",
        ("She has read 3 * 7 = 21 pages.", "50 - 21 = 29 pages are left."),
        29,
    ),
    (
        "A rope of 40 feet is cut into 5 equal pieces. How long are 2 of them?",
        ("One piece is 40 / 5 = 8 feet long.", "Two are 2 * 8 = 16 feet long."),
        16,
    ),
    (
        "Omar works 6 hours for $9 an hour. He spends $14 and then gets back $5. How many dollars has he?",
        (
            "He earns 6 * 9 = 54 dollars.",
            "After spending he has 54 - 14 = 40 dollars.",
            "Now he has 40 + 5 = 45 dollars.",
        ),
        45,
    ),
    (
        "A bowl holds 45 plums. 9 of them go bad, and 4 friends share the rest. How many plums does each get?",
        ("45 - 9 = 36 plums are good.", "Each friend gets 36 / 4 = 9 plums."),
        9,
    ),
    (
        "A class has 12 girls and twice as many boys. How many children are in it?",
        ("There are 2 * 12 = 24 boys.", "12 + 24 = 36 children are in the class."),
        36,
    ),
)
# Problems, each with a second problem that uses its answer.
FOLLOWING: tuple[tuple[Solved, Solved], ...] = (
    (
        SOLVED[0],
        (
            "Kim puts X muffins into boxes of 3 and sells each box for $4. How many dollars does she get?",
            ("X is 15, so there are 15 / 3 = 5 boxes.", "She gets 5 * 4 = 20 dollars."),
            20,
        ),
    ),
    (
        SOLVED[5],
        (
            "Sam has $X and his sister has $7 more. How many dollars do both have?",
            ("X is 45, so she has 45 + 7 = 52 dollars.", "Both have 45 + 52 = 97 dollars."),
            97,
        ),
    ),
)

# The few-shot problems are like those of the demo, with other names and things. The number of turns and the wording of
# the steps were chosen by measurement, mainly for direct solving: beating a weak baseline would prove nothing.
SHOTS = (
    Shares(("Rob", "Zoe", "Nia", "Max", "Tom", "Una"), (2, 2, 5, 1, 4, 3), "stickers"),
    Shares(("Zoe", "Val", "Tom", "Una", "Pam", "Kim"), (1, 5, 4, 2, 3, 1), "keys"),
    Shares(("Una", "Oli", "Val", "Nia", "Rob", "Pam"), (3, 4, 2, 5, 1, 2), "apples"),
    Shares(("Max", "Kim", "Una", "Pam", "Oli", "Zoe"), (5, 3, 1, 4, 2, 4), "stickers"),
)
# Subproblems of the few-shot style, and their solutions.
SUMS = (
    ("What is 2 + 2?", "2 + 2 = 4"),
    ("What is 5 + 4?", "5 + 4 = 9"),
    ("What is 2 + 1?", "2 + 1 = 3"),
    ("What is 1 + 5?", "1 + 5 = 6"),
)


def sums_term_by_term(amounts: Sequence[int]) -> list[str]:
    """A sum, computed term by term: "1 + 2 = 3", "3 + 4 = 7". A small model adds three at once less reliably."""
    totals = list(accumulate(amounts))
    return [
        f"{before} + {amount} = {total}" for before, amount, total in zip(totals, amounts[1:], totals[1:], strict=False)
    ]


def term_by_term(amounts: Sequence[int]) -> str:
    """A sum in words, computed term by term."""
    lines = [f"{'Then' if place else 'First'}, {line}." for place, line in enumerate(sums_term_by_term(amounts))]
    return " ".join([*lines, f"The answer is {sum(amounts)}."])


def pair_sums(amounts: Sequence[int]) -> list[int]:
    """Sums of the first two amounts, of the next two, and so on."""
    return [sum(amounts[start : start + 2]) for start in range(0, len(amounts), 2)]
