"""Questions made from the text itself, without a model: retrieval over the whole context.

Six tasks. Each asks for something that is in the window once, at a place drawn evenly from all
places that would do, and answers with text or names that are there too:

- `who_said`: whose words a quoted speech is;
- `what_follows`: the sentence after a given one;
- `fill_name`: the name left out of a sentence;
- `find_needle`: the one sentence with a given rare word;
- `order_of_events`: in which order given sentences come;
- `multi_hop`: a name left out in one section, then what another section first says of that name.

Names and speech are known by capital letters and quotation marks, so texts in scripts without
capitals (Chinese, Thai, Arabic, …) carry `what_follows`, `find_needle` and `order_of_events`.

A task that a text cannot carry (nobody speaks in a report) gives None. The random generator passed
in is the only source of chance: the same seed gives the same question.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import regex

from longlora_plugin.longqa.scripts import WIDE, sentences, share_of_letters, terms, width
from longlora_plugin.longqa.sections import Window

SHORTEST, LONGEST = 25, 320
"""Width (`scripts.width`) of a sentence that a question may quote or an answer may be."""

GAP = "_____"
# fmt: off
_NO_NAMES = frozenset((
    "A", "An", "And", "As", "At", "But", "By", "For", "From", "Had", "Has", "He", "Her", "Here",
    "His", "How", "I", "If", "In", "It", "Its", "My", "No", "Nor", "Not", "Now", "O", "Of", "Oh",
    "On", "Or", "Our", "She", "So", "Some", "Such", "That", "The", "Their", "Then", "There",
    "These", "They", "This", "Those", "Thou", "Thus", "To", "We", "Well", "What", "When", "Where",
    "Which", "While", "Who", "Why", "With", "Yes", "You", "Your", "January", "February", "March",
    "April", "May", "June", "July", "August", "September", "October", "November", "December",
    "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday", "Chapter",
    "Section", "Figure", "Table", "Scene", "Act", "Enter", "Exit", "Exeunt",
))
# fmt: on
_NAME = r"\p{Lu}[\p{L}’'-]+(?: \p{Lu}[\p{L}’'-]+)?"
_TITLED = rf"(?:(?:Mr|Mrs|Miss|Ms|Dr|Sir|Lady|Lord|Captain|Colonel|Professor)\.? )?{_NAME}"
_SAY = (
    "said|replied|cried|answered|asked|exclaimed|returned|observed|added|whispered|continued|"
    "repeated|remarked|shouted|says|asks|told"
)
_WORDS = r"[“\"](?P<words>[^”\"]{20,300}?)[,.!?]?[”\"]"
_SPEECH = (
    regex.compile(rf"{_WORDS},? (?:{_SAY}) (?P<who>{_TITLED})"),
    regex.compile(rf"{_WORDS},? (?P<who>{_TITLED}) (?:{_SAY})\b"),
    regex.compile(rf"\b(?P<who>{_TITLED}) (?:{_SAY})[,:] {_WORDS}"),
    regex.compile(
        rf"\b(?P<who>{_NAME}) (?:said|answered|spake)(?: unto [^,.;]{{2,40}})?,"
        r" (?P<words>\p{Lu}[^.;:!?“”\"]{20,200})[.;:!?]"
    ),
)
# A play: the speaker's name in capitals, then the speech.
_PLAY = regex.compile(
    r"(?m)^(?P<who>\p{Lu}[\p{Lu}’' -]{1,28}\p{Lu})[.:]\n?[ ]?(?P<words>[^\n]{20,200})$"
)


@dataclass(frozen=True)
class Pair:
    """A question about a window, and its answer.

    Attributes:
        task: which task made it; `model` where a model did.
        evidence: what in the window shows that the answer is right, verbatim.
    """

    task: str
    question: str
    answer: str
    evidence: tuple[str, ...] = ()


@dataclass
class Material:
    """A window taken apart for the tasks.

    Attributes:
        parts: the sentences of each section that occur once in the window and are fit to quote,
            with the sentence that follows each (None at the section's end).
        found: how many sentences there are, fit or not.
        words: how often each word (`scripts.terms`) occurs in the window, case aside.
    """

    window: Window
    language: str = "en"
    parts: list[list[tuple[str, str | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        seen: Counter[str] = Counter()
        raw = [sentences(section, self.language) for section in self.window.sections]
        for found in raw:
            seen.update(found)
        self.found = seen.total()
        for found in raw:
            fit = [_is_fit(text) and seen[text] == 1 for text in found]
            self.parts.append(
                [
                    (text, found[i + 1] if i + 1 < len(found) and fit[i + 1] else None)
                    for i, text in enumerate(found)
                    if fit[i]
                ]
            )
        self.words = Counter(term.casefold() for term in terms(self.window.text))

    @property
    def all(self) -> list[tuple[str, str | None]]:
        return [entry for part in self.parts for entry in part]

    @cached_property
    def names(self) -> list[str]:
        """Names that occur in the window at least twice: people and places."""
        # A capital inside a sentence, on a word that the window never writes small.
        inner = regex.findall(r"(?<=[\p{Ll},;] )\p{Lu}[\p{Ll}’'-]{2,}", self.window.text)
        found = {name.removesuffix("’s").removesuffix("'s") for name in inner} - _NO_NAMES
        written = Counter(re.findall(r"\w+", self.window.text))
        return sorted(name for name in found if written[name] >= 2 and not written[name.lower()])


def _is_fit(text: str) -> bool:
    """Whether a question can quote `text`: a sentence, of some length, and not a table or so."""
    if not SHORTEST <= width(text) <= LONGEST or "\n\n" in text or GAP in text:
        return False
    return share_of_letters(text) >= 0.75 and not text.startswith(("#", "|", "!["))


def who_said(material: Material, rng: random.Random) -> Pair | None:
    """Whose words a quoted speech is."""
    text = material.window.text
    lines = list(_PLAY.finditer(text))
    turns = Counter(match["who"] for match in lines)
    matches = [match for match in lines if turns[match["who"]] >= 2]
    matches += [match for pattern in _SPEECH for match in pattern.finditer(text)]
    speeches: dict[str, tuple[str, str]] = {}
    for match in matches:
        said_by, words = match["who"].split(), match["words"].strip()
        while said_by and said_by[0] in _NO_NAMES:
            said_by = said_by[1:]
        who = " ".join(said_by)
        if who and text.count(words) == 1 and "\n\n" not in words:
            speeches.setdefault(words, (who, match.group(0)))
    if not speeches:
        return None
    words = rng.choice(sorted(speeches))
    who, evidence = speeches[words]
    question = rng.choice(
        (
            f"Who says these words? “{words}”",
            f"Name the speaker of the following: “{words}”",
            f"Whose words are these: “{words}”? Reply with the name only.",
        )
    )
    return Pair("who_said", question, who, (evidence,))


def what_follows(material: Material, rng: random.Random) -> Pair | None:
    """The sentence right after a given one."""
    followed = [(text, after) for text, after in material.all if after]
    if not followed:
        return None
    text, after = rng.choice(followed)
    question = rng.choice(
        (
            f"Which sentence comes directly after this one? “{text}”",
            f"Quote the sentence that follows: “{text}”",
            f"After “{text}”, how does the text go on? Give the next sentence, word for word.",
        )
    )
    return Pair("what_follows", question, after, (text, after))


def _gaps(sentence: str, name: str) -> str:
    return re.sub(rf"\b{re.escape(name)}\b", GAP, sentence)


def _mentions(sentence: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", sentence) is not None


def fill_name(material: Material, rng: random.Random) -> Pair | None:
    """The name left out of a sentence of the text."""
    names = set(material.names)
    usable = [
        (text, hit)
        for text, _ in material.all
        if (hit := sorted(names.intersection(re.findall(r"[\w’'-]+", text))))
    ]
    if not usable:
        return None
    sentence, choices = rng.choice(usable)
    name = rng.choice(choices)
    gapped = _gaps(sentence, name)
    question = rng.choice(
        (
            f"Which name belongs in the gap? “{gapped}”",
            f"One name has been taken out of this sentence: “{gapped}” What was it?",
            f"Fill in the missing name: “{gapped}”",
        )
    )
    return Pair("fill_name", question, name, (sentence,))


def find_needle(material: Material, rng: random.Random) -> Pair | None:
    """The one sentence with a word that occurs nowhere else."""
    holders = []
    for text, _ in material.all:
        rare = [
            word
            for word in terms(text)
            if material.words[word.casefold()] == 1 and (width(word) >= 6 or word.isdigit())
        ]
        if rare:
            holders.append((text, sorted(set(rare))))
    if not holders:
        return None
    sentence, rare = rng.choice(holders)
    word = rng.choice(rare)
    question = rng.choice(
        (
            f"Exactly one sentence contains “{word}”. Copy that sentence.",
            f"Find the sentence in which “{word}” occurs and quote it in full.",
            f"Where does “{word}” stand? Give the whole sentence.",
        )
    )
    return Pair("find_needle", question, sentence, (sentence,))


def order_of_events(material: Material, rng: random.Random) -> Pair | None:
    """In which order three or four sentences come in the text."""
    found = [text for text, _ in material.all]
    wanted = 4 if len(found) >= 12 else 3
    if len(found) < 2 * wanted:
        return None
    # One from each stretch of the text, so that the order spans all of it.
    edges = [len(found) * part // wanted for part in range(wanted + 1)]
    told = [rng.choice(found[a:b]) for a, b in pairwise(edges)]
    letters = "ABCD"[:wanted]
    shuffled = list(range(wanted))
    while shuffled == list(range(wanted)):
        rng.shuffle(shuffled)
    listed = "\n".join(
        f"({letter}) {told[place]}" for letter, place in zip(letters, shuffled, strict=True)
    )
    answer = ", ".join(letters[shuffled.index(place)] for place in range(wanted))
    question = rng.choice(
        (
            f"In which order do these sentences stand? Reply with the letters.\n{listed}",
            f"Sort these sentences by where they come, earliest first; letters only.\n{listed}",
            f"These sentences were shuffled. Give the letters in the order of the text.\n{listed}",
        )
    )
    return Pair("order_of_events", question, answer, tuple(told))


def multi_hop(material: Material, rng: random.Random) -> Pair | None:
    """A name left out in one section, then the first sentence of another section that has it."""
    parts = [[text for text, _ in part] for part in material.parts]
    parts = [part for part in parts if part]
    if len(parts) == 1 and len(parts[0]) >= 12:
        middle = len(parts[0]) // 2
        parts = [parts[0][:middle], parts[0][middle:]]
    usable = []
    for name in material.names:
        holders = [i for i, part in enumerate(parts) if any(_mentions(s, name) for s in part)]
        answers = {i: answer for i in holders if (answer := _first_with(material, parts[i], name))}
        if answers and len(holders) >= 2:
            usable.append((name, holders, answers))
    if not usable:
        return None
    name, holders, answers = rng.choice(usable)
    second = rng.choice(sorted(answers))
    first = rng.choice([place for place in holders if place != second])
    clue = rng.choice([s for s in parts[first] if _mentions(s, name)])
    opening = " ".join(parts[second][0].split()[:8])
    question = rng.choice(
        (
            f"A name is missing here: “{_gaps(clue, name)}” Work out which, then turn to the "
            f"place that reads “{opening} …” and quote from there on the first sentence with that "
            f"name.",
            f"Find the name for the gap: “{_gaps(clue, name)}” Then, reading on from "
            f"“{opening} …”, copy the first sentence that mentions it.",
        )
    )
    return Pair("multi_hop", question, answers[second], (clue, answers[second]))


def _first_with(material: Material, part: list[str], name: str) -> str | None:
    """The sentence of `part` with the text's first mention of `name` from the part's start on."""
    text = material.window.text
    start = text.find(part[0])
    first = re.compile(rf"\b{re.escape(name)}\b").search(text, start)
    for sentence in part:
        at = text.find(sentence)
        if first and at <= first.start() < at + len(sentence):
            return sentence
    return None


TASKS: dict[str, Callable[[Material, random.Random], Pair | None]] = {
    "who_said": who_said,
    "what_follows": what_follows,
    "fill_name": fill_name,
    "find_needle": find_needle,
    "order_of_events": order_of_events,
    "multi_hop": multi_hop,
}
"""Every task, in the order in which they are tried."""


def why_none(material: Material, names: tuple[str, ...]) -> str:
    """Why a window gives no pairs, for the report."""
    fit = len(material.all)
    if not fit:
        return (
            f"none of its {material.found} sentences can be asked about: each is shorter than "
            f"{SHORTEST} or longer than {LONGEST} characters (Han, Kana and Hangul count as "
            f"{WIDE}), not mostly letters, or there more than once"
        )
    return (
        f"{', '.join(names)}: none finds anything in its {fit} usable sentences; speech and names "
        "are known by quotation marks and capital letters, and an order needs 6 sentences"
    )


def make_pairs(
    material: Material, wanted: int, rng: random.Random, names: tuple[str, ...] = tuple(TASKS)
) -> list[Pair]:
    """Up to `wanted` different pairs about a window, the tasks taking turns.

    Args:
        names: which of TASKS may be used.
    """
    found: list[Pair] = []
    asked: set[tuple[str, str, tuple[str, ...]]] = set()
    idle = 0
    for turn in range(8 * wanted * len(names)):
        if len(found) == wanted or idle > 4 * len(names):
            break
        pair = TASKS[names[turn % len(names)]](material, rng)
        key = (pair.task, pair.answer, pair.evidence) if pair else None
        if pair is None or key is None or key in asked:
            idle += 1
            continue
        idle = 0
        asked.add(key)
        found.append(pair)
    return found
