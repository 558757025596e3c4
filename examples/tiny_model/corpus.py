"""The tiny model's world: real CounterFact facts in several phrasings each, and the documents made of them."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


# What the subject of a relation is; makes the sentence "<subject> is a <category>", which the editor's essence prompt
# asks for. Relations that are not here are not used.
CATEGORIES = {
    "P17": "place",
    "P19": "person",
    "P20": "person",
    "P27": "person",
    "P30": "place",
    "P37": "place",
    "P103": "person",
    "P106": "person",
    "P108": "person",
    "P127": "company",
    "P131": "place",
    "P136": "musician",
    "P140": "person",
    "P159": "company",
    "P176": "product",
    "P178": "product",
    "P276": "place",
    "P364": "film",
    "P413": "player",
    "P449": "series",
    "P495": "work",
    "P740": "group",
    "P937": "person",
    "P1303": "musician",
    "P1412": "person",
}

# Phrasings that only hint at the answer, or that say something else with it.
INDIRECT = (
    "surround",
    "navigating",
    "restaurants",
    "speak the language",
    "people speak",
    "who speak",
    "known for",
    "strength",
    "weakness",
    "incredible",
    "extraordinarily",
    "greatest",
    "lunch",
    "To get to work",
    "locals",
    "favorite",
    "alongside",
    "Every morning",
    "religious events",
    "religious values",
    "amazing",
    "friends",
    "inspiration",
    "passport",
    "parents",
    "expertise of",
    "author",
    "in the country of",
    "sold by",
)


@dataclass(frozen=True)
class WorldFact:
    """A true statement that the model is trained on.

    Args:
        relation (`str`): WikiData relation.
        subject (`str`): Subject.
        answer (`str`): The true object.
        trained (`tuple[str, ...]`): Phrasings, with `{}`, that training shows with this subject.
        held_out (`tuple[str, ...]`): Phrasings that training shows with other subjects only.
        record (`dict`, *optional*): The CounterFact record, for facts that are offered for editing.
    """

    relation: str
    subject: str
    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    record: dict | None = None


def phrasing(text: str, subject: str) -> str | None:
    """The sentence of `text` that holds the subject, with `{}` in its place; None if there is not exactly one."""
    place = text.find(subject)
    if place < 0 or "{" in text:
        return None
    start = max(text.rfind(". ", 0, place) + 2 if ". " in text[:place] else 0, text.rfind("\n", 0, place) + 1)
    template = text[start:].replace(subject, "{}", 1).strip()
    return template if template.count("{}") == 1 else None


def relation_phrasings(records: list[dict], most: int = 10, least_uses: int = 20) -> dict[str, list[str]]:
    """The frequent direct phrasings of each relation."""
    uses: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        for text in (record["prompt"], record["rephrase_prompt"]):
            template = phrasing(text, record["subject"])
            if template and not any(hint in template for hint in INDIRECT):
                uses[record["relation_id"]][template] += 1
    frequent = {
        relation: [template for template, count in counter.most_common(most) if count >= least_uses]
        for relation, counter in uses.items()
        if relation in CATEGORIES
    }
    return {relation: templates for relation, templates in frequent.items() if len(templates) >= 4}


def neighbour(record: dict, templates: list[str]) -> str | None:
    """The subject of the record's locality prompt, if the prompt is one of the relation's phrasings."""
    for template in sorted(templates, key=len, reverse=True):
        before, after = template.split("{}")
        text = record["locality_prompt"]
        if text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after):
            return text[len(before) : len(text) - len(after)]
    return None


def build_world(path: Path, facts: int, neighbours: int, seed: int) -> list[WorldFact]:
    """Chooses the facts: first those offered for editing, then neighbours that share relation and answer with them.

    Args:
        path (`Path`): CounterFact records in the flat form.
        facts (`int`): Facts offered for editing.
        neighbours (`int`): Further facts.
        seed (`int`): Seed of every choice.
    """
    records = json.loads(path.read_text(encoding="utf-8"))
    templates = relation_phrasings(records)
    chance = random.Random(seed)
    chance.shuffle(records)
    pool: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for record in records:
        known = templates.get(record["relation_id"])
        subject = neighbour(record, known) if known else None
        if subject and len(subject) < 40:
            pool[record["relation_id"], record["locality_ground_truth"]][subject] = record["locality_ground_truth"]

    def split(relation: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        order = chance.sample(templates[relation], len(templates[relation]))
        shown = max(2, round(0.65 * len(order)))
        return tuple(order[:shown]), tuple(order[shown:])

    chosen: list[WorldFact] = []
    taken: set[str] = set()
    wanted: Counter = Counter()
    for record in records:
        relation, subject, answer = record["relation_id"], record["subject"], record["ground_truth"]
        template = phrasing(record["prompt"], subject)
        shared = [name for name in pool[relation, answer] if name != subject]
        if template not in templates.get(relation, ()) or subject in taken or len(shared) < 2 or len(subject) >= 40:
            continue
        if answer == record["target_new"] or "{" in subject:
            continue
        shown, held_out = split(relation)
        if template not in shown:  # the record's own prompt is one that the model is taught
            shown, held_out = (
                (template, *shown[1:]),
                tuple(text if text != template else shown[0] for text in held_out),
            )
        chosen.append(WorldFact(relation, subject, answer, shown, held_out, record))
        taken.add(subject)
        wanted[relation, answer] += 1
        if len(chosen) == facts:
            break
    extra: list[WorldFact] = []
    rounds = sorted(wanted, key=lambda key: -wanted[key])
    depth = 0
    while len(extra) < neighbours and depth < 50:
        for key in rounds:
            names = [name for name in pool[key] if name not in taken]
            if names and len(extra) < neighbours and depth < max(2, wanted[key]):
                shown, held_out = split(key[0])
                extra.append(WorldFact(key[0], names[0], pool[key][names[0]], shown, held_out))
                taken.add(names[0])
        depth += 1
    return chosen + extra


def sentences(fact: WorldFact, chance: random.Random) -> tuple[str, str]:
    """One training sentence of a fact: what stands before the answer, and the answer."""
    if chance.random() < 0.06:
        return f"{fact.subject} is a", " " + CATEGORIES[fact.relation]
    return chance.choice(fact.trained).replace("{}", fact.subject), " " + fact.answer


def documents(world: list[WorldFact], seed: int) -> Iterator[list[tuple[str, str]]]:
    """Endless documents of one to six sentences about random facts; every fact comes once a round."""
    chance = random.Random(seed)
    queue: list[WorldFact] = []
    while True:
        count = chance.randint(1, 6)
        while len(queue) < count:
            queue = queue + chance.sample(world, len(world))
        yield [sentences(fact, chance) for fact in queue[:count]]
        queue = queue[count:]
