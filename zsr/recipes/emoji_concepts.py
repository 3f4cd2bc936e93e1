"""Which emoji become classes, and which of them are held out: pure functions, no images.

A class is a concept, that is one codepoint sequence drawn by several vendors. Zero-shot numbers mean something only if the
names differ in what they show and no held-out name is a training name in other words, so two things happen here:

* choice: flags, digits and letters, clock faces, gendered and mirrored twins, colour series and faces that differ in a
  pixel or two at 64 px are left out;
* split: names that share their content words ("bus", "oncoming bus", "bus stop") form a family, and a family goes to one
  split as a whole. Held-out families are drawn, with a fixed seed, from those whose words the other captions also use: a text
  tower that learned its words from training captions then has a chance, and the test is of the images, not of rare words.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from dataclasses import dataclass

TRAIN_STYLES = ("noto", "twemoji", "emojione", "fxemoji")
HELD_OUT_STYLE = "fluent"
STYLES = (*TRAIN_STYLES, HELD_OUT_STYLE)


@dataclass(frozen=True)
class Concept:
    """One class: `icons` maps a style to the slug of its drawing."""

    codepoint: str
    name: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]
    icons: dict[str, str]


# Subgroups that hold marks, letters or one shape in many colours: nothing a caption describes by what it depicts.
DROPPED_SUBGROUPS = frozenset(
    "flag keycap alphanum av-symbol geometric arrow zodiac gender math punctuation currency subdivision-flag "
    "country-flag hair-style skin-tone family person-symbol".split()
)

# Names that start so have a neutral "person ..." twin that is kept.
GENDERED = re.compile(r"^(man|woman|men|women|merman|mermaid|mx|mrs\.)\b", re.IGNORECASE)
KEPT_DESPITE_GENDER = frozenset(
    "man|woman|man dancing|woman dancing|woman with headscarf|"
    "woman’s clothes|woman’s hat|woman’s boot|woman’s sandal|man’s shoe".split("|")
)

# Twins of a kept concept: same drawing but for a colour, a side, a mouth or a hand.
DROPPED_NAMES = frozenset(
    name
    for line in """
grinning face with smiling eyes|beaming face with smiling eyes|grinning face with big eyes|slightly smiling face
smiling face|smiling face with open hands|kissing face|kissing face with closed eyes|kissing face with smiling eyes
winking face with tongue|squinting face with tongue|face savoring food|face with open eyes and hand over mouth
dotted line face|face in clouds|face exhaling|shaking face|head shaking horizontally|head shaking vertically|smirking face
unamused face|relieved face|pensive face|face with spiral eyes|woozy face|confused face|face with diagonal mouth
slightly frowning face|worried face|hushed face|astonished face|face with open mouth|anguished face|anxious face with sweat
sad but relieved face|confounded face|persevering face|disappointed face|downcast face with sweat|tired face|pleading face
frowning face with open mouth|enraged face|grinning cat with smiling eyes|cat with wry smile|weary cat|pouting cat
expressionless face|face without mouth|face holding back tears|smiling face with tear|grimacing face|sleepy face
hear-no-evil monkey|speak-no-evil monkey|orange heart|yellow heart|green heart|blue heart|light blue heart|purple heart
brown heart|black heart|grey heart|white heart|pink heart|heart exclamation|beating heart|growing heart|two hearts
left speech bubble|dizzy|hole
raised back of hand|hand with fingers splayed|rightwards hand|leftwards hand|palm down hand|palm up hand
rightwards pushing hand|leftwards pushing hand|pinching hand|backhand index pointing left|backhand index pointing up
backhand index pointing down|right-facing fist|left-facing fist|open hands|middle finger
person|child|person blond hair|person beard|older person|person red hair|person curly hair|person white hair|person bald
deaf person|deaf man|deaf woman|person kneeling facing right|person walking facing right|person running facing right|person standing
person with white cane facing right|person in motorized wheelchair facing right|person in manual wheelchair facing right
people with bunny ears|pregnant person|pregnant woman|breast-feeding|person feeding baby|person with veil|person in tuxedo
person with skullcap|health worker|office worker|technologist|student|factory worker|person pouting|person frowning
person gesturing OK|person tipping hand|supervillain|people hugging
globe showing Americas|globe showing Asia-Australia|new moon|waxing crescent moon|first quarter moon|waxing gibbous moon
waning gibbous moon|last quarter moon|waning crescent moon|first quarter moon face|last quarter moon face|new moon face
sun behind small cloud|sun behind large cloud|hourglass not done|snowman without snow|umbrella|closed umbrella
full moon|sunrise over mountains|cityscape at dusk|fog|glowing star
yen banknote|euro banknote|pound banknote|blue book|green book|orange book|notebook|ledger|notebook with decorative cover
speaker low volume|speaker medium volume|muted speaker|musical notes|closed mailbox with lowered flag
open mailbox with raised flag|open mailbox with lowered flag|magnifying glass tilted right|incoming envelope
envelope with arrow|e-mail|inbox tray|locked with pen|locked with key|low battery|bell with slash|page facing up
spiral calendar|tear-off calendar|round pushpin|camera with flash|dvd|floppy disk|videocassette|card index
front-facing baby chick|ewe|two-hump camel|horse|cow|pig|mouse|rat|dog|cat|tiger|rabbit|whale|oncoming bus|oncoming taxi
oncoming automobile|oncoming police car|train|metro|light rail|tram car|mountain railway|bullet train|station|ship
motorized wheelchair|black bird|service dog|dragon|beer mug|softball|red apple|brown mushroom
heart suit|diamond suit|club suit|spade suit|2nd place medal|3rd place medal|hollow red circle|check box with check
check mark|cross mark button|curly loop|double curly loop|eight-spoked asterisk|eight-pointed star|sparkle|trade mark
part alternation mark|Japanese symbol for beginner|non-potable water|men’s room|women’s room|dotted six-pointed star
litter in bin sign|baby symbol|no littering|no mobile phones|children crossing|name badge|trident emblem|left luggage
customs|passport control|baggage claim|water closet|ATM sign|restroom|place of worship|medical symbol|orthodox cross|wind face
minus|mahjong red dragon|credit card|Japanese post office|placard|white cane|broken chain
""".strip().splitlines()
    for name in line.split("|")
)

# Words that say nothing of what is drawn, or that too many names share to tie a family together.
STOP_WORDS = frozenset(
    "a an and the of with in on to behind for no not face person man woman people symbol sign button mark place "
    "red green blue white black yellow orange brown one large small high low old open closed oncoming facing "
    "holding getting playing japanese japan s light left right hot cold baby hand over up down full new flat".split()
)

# Families that share a meaning but no word.
SYNONYMS = [
    line.split("|")
    for line in """
automobile|sport utility vehicle|racing car|taxi|police car|pickup truck
high-speed train|locomotive|railway car|monorail|tram|suspension railway
passenger ship|ferry|motor boat|speedboat|sailboat
mountain cableway|aerial tramway
bus|minibus|trolleybus
motorcycle|motor scooter
delivery truck|articulated lorry
scroll|page with curl|memo|newspaper|rolled-up newspaper
loudspeaker|megaphone
television|desktop computer|laptop
telephone|telephone receiver|mobile phone
glasses|sunglasses|goggles
handbag|purse|clutch bag
pen|fountain pen|black nib|pencil
whale|spouting whale
camel|llama
crocodile|lizard
dog face|guide dog|poodle|wolf
beetle|lady beetle|bug|cockroach
chicken|rooster|hatching chick|baby chick
church|wedding
skis|skier
running shoe|man’s shoe|hiking boot
shield|crossed swords|dagger
bouquet|tulip|rose|hibiscus|blossom|cherry blossom|white flower|rosette
deer|moose
ox|cow face|water buffalo|bison
monkey|monkey face|see-no-evil monkey
chart increasing|chart decreasing|bar chart|chart increasing with yen
house|houses|house with garden
clinking glasses|clinking beer mugs|tumbler glass
cocktail glass|tropical drink
axe|hammer|pick
file folder|open file folder|card index dividers
key|old key
gear|wrench|nut and bolt
hot springs|person in steamy room
smiling face with horns|angry face with horns|goblin|ogre
""".strip().splitlines()
]


def is_kept(name: str, subgroup: str) -> bool:
    """The choice of classes, in one place; a drawing in every needed style is checked by the caller."""
    if subgroup in DROPPED_SUBGROUPS or name in DROPPED_NAMES:
        return False
    if "o’clock" in name or "-thirty" in name:
        return False
    return name in KEPT_DESPITE_GENDER or not GENDERED.match(name)


def content_words(text: str) -> frozenset[str]:
    words = re.findall(r"[a-z0-9]+", text.lower().replace("’s", ""))
    return (
        frozenset(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words) - STOP_WORDS
    )


def families(concepts: list[Concept]) -> list[list[Concept]]:
    """Connected components of "shares a content word, or is listed as a synonym"."""
    parent = {c.codepoint: c.codepoint for c in concepts}

    def root(key: str) -> str:
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    owners: dict[str, list[str]] = defaultdict(list)
    by_name = {c.name: c.codepoint for c in concepts}
    for concept in concepts:
        for word in content_words(concept.name):
            owners[word].append(concept.codepoint)
    links = [*owners.values(), *([by_name[n] for n in names if n in by_name] for names in SYNONYMS)]
    for linked in links:
        for other in linked[1:]:
            parent[root(other)] = root(linked[0])
    grouped: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts:
        grouped[root(concept.codepoint)].append(concept)
    return list(grouped.values())


def split_concepts(concepts: list[Concept], held_out: float, seed: int) -> dict[str, list[Concept]]:
    """Concepts of `train`, `val` and `test`, each in the given order; val and test take `held_out` of the concepts each.

    Only small families (at most 3 names) may be held out, so that a held-out name is not surrounded by others of its own family,
    and those whose words are found in other families' captions come first. The draw is stratified by group.
    """
    usage: dict[str, set[int]] = defaultdict(set)
    grouped = families(concepts)
    for index, family in enumerate(grouped):
        for concept in family:
            for word in content_words(" ".join((concept.name, *concept.keywords))):
                usage[word].add(index)

    def is_covered(index: int) -> bool:
        words = frozenset().union(*(content_words(c.name) for c in grouped[index]))
        return bool(words) and all(usage[w] - {index} for w in words)

    rng = random.Random(seed)
    strata: dict[str, list[int]] = defaultdict(list)
    for index, family in enumerate(grouped):
        if len(family) <= 3:
            strata[family[0].group].append(index)
    size_of_group = {g: sum(c.group == g for c in concepts) for g in strata}
    assigned: dict[str, str] = {}
    for group in sorted(strata):
        order = sorted(strata[group])
        rng.shuffle(order)
        order.sort(key=lambda index: not is_covered(index))
        quota = {"val": round(held_out * size_of_group[group]), "test": round(held_out * size_of_group[group])}
        turn = 0
        for index in order:
            split = ("val", "test")[turn % 2]
            if quota[split] < len(grouped[index]):
                split = ("test", "val")[turn % 2]
            if quota[split] < len(grouped[index]):
                continue
            quota[split] -= len(grouped[index])
            turn += 1
            assigned.update({c.codepoint: split for c in grouped[index]})
    splits: dict[str, list[Concept]] = {"train": [], "val": [], "test": []}
    for concept in concepts:
        splits[assigned.get(concept.codepoint, "train")].append(concept)
    return splits
