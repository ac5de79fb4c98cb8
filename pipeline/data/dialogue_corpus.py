"""A generated corpus of dialogues whose summaries take reading.

Every scene is played by rules: someone proposes, asks or has lost something; the other accepts, refuses with a reason
or counters; times, places and choices change on the way. The summary follows from the outcome: who did what, and what
was agreed on last. Chatter names people, places and times that do not matter.

A scene also tells the same outcome as a story and as questions with answers, in other words than the summary's: a base
model pretrained on those has learned to read dialogues but not to summarize them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from . import dialogue_words as words


@dataclass(frozen=True)
class GeneratedDialogue:
    """A dialogue, one line a turn, and what can be said about it."""

    text: str
    summary: str
    story: str
    questions: tuple[tuple[str, str], ...]


def generate_dialogues(count: int, seed: int) -> list[GeneratedDialogue]:
    """`count` different dialogues. The first n of a longer list are the list of n."""
    return list(islice(play_dialogues(seed), count))


def play_dialogues(seed: int) -> Iterator[GeneratedDialogue]:
    """Dialogues without end, none of them twice."""
    rng = random.Random(seed)
    played: set[str] = set()
    while True:
        dialogue = _play(rng)
        if dialogue.text not in played:
            played.add(dialogue.text)
            yield dialogue


class _Stage:
    """The people of a scene, their words so far, and dice."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.lines: list[tuple[str, str]] = []
        self.a, self.b, self.other = self.different(words.HER_NAMES + words.HIS_NAMES, 3)

    def choice(self, options):
        return self.rng.choice(options)

    def different(self, options, count: int) -> list:
        """`count` different options in random order."""
        return self.rng.sample(options, count)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def say(self, speaker: str, *variants: str) -> None:
        self.lines.append((speaker, self.choice(variants)))

    def chatter(self) -> None:
        """Two turns that do not matter."""
        first, second = self.choice(words.SMALL_TALK)
        told = {"other": self.other, "place": self.choice(words.PLACES), "time": self.choice(words.TIMES)}
        speakers = [self.a, self.b]
        if self.chance(0.5):
            speakers.reverse()
        self.lines.append((speakers[0], first.format(**told)))
        self.lines.append((speakers[1], second.format(**told)))

    def reason(self, person: str) -> tuple[str, str]:
        """Why `person` cannot: in the person's own words, and in a summary's."""
        own, told = self.choice(words.REASONS)
        return own, told.format(their=_their(person))


Outcome = tuple[str, str, tuple[tuple[str, str], ...]]
"""Summary, story, questions with answers."""


def _their(name: str) -> str:
    return "her" if name in words.HER_NAMES else "his"


def _them(name: str) -> str:
    return "her" if name in words.HER_NAMES else "him"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _agree(stage: _Stage, speaker: str, agreed: str | None = None) -> None:
    """`speaker` accepts, often by repeating what is agreed."""
    if agreed is not None and stage.chance(0.6):
        stage.say(speaker, f"OK, {agreed}.", f"Sure, {agreed}.", f"Fine, {agreed} then.")
    else:
        stage.say(speaker, "OK.", "Sure.", "Fine with me.", "All right.", "Great!", "Perfect.", "Good idea.")


def _accept_pity(stage: _Stage, speaker: str) -> None:
    stage.say(speaker, "What a pity.", "No problem.", "I see. Maybe next time.", "Oh, too bad.")


def _refuse(stage: _Stage, speaker: str) -> str:
    """`speaker` refuses; returns the reason in a summary's words."""
    own, told = stage.reason(speaker)
    stage.say(speaker, f"Sorry, I can't. {_capital(own)}.", f"I would love to, but {own}.", f"No, {own}.")
    return told


def _negotiate(stage: _Stage, options: tuple[str, ...], ask: str, first: str, second: str) -> str:
    """`first` proposes one of `options`; it may be changed, and the change may be refused. Returns the last agreed."""
    agreed, wish = stage.different(options, 2)
    stage.say(first, ask.format(option=agreed), f"Let's say {agreed}.", f"Maybe {agreed}?")
    course = stage.rng.random()
    if course < 0.4:
        _agree(stage, second, agreed)
        return agreed
    stage.say(second, f"Rather {wish}.", f"I would prefer {wish}.", f"Could we make it {wish}?")
    if course < 0.8:
        _agree(stage, first, wish)
        return wish
    stage.say(first, f"No, {wish} is bad for me.", f"Sorry, {wish} does not work.")
    stage.say(second, f"OK, {agreed} then.", f"Fine, {agreed}.")
    return agreed


def _meeting(stage: _Stage) -> Outcome:
    a, b = stage.a, stage.b
    activity, day = stage.choice(words.ACTIVITIES), stage.choice(words.DAYS)
    stage.say(a, f"Shall we {activity} {day}?", f"Do you want to {activity} {day}?", f"Let's {activity} {day}!")
    if stage.chance(0.3):
        why = _refuse(stage, b)
        _accept_pity(stage, a)
        return (
            f"{a} wants to {activity} {day}, but {b} {why}.",
            f"{b} said no to {a} because {b} {why}.",
            (("Who said no?", b), ("Why?", f"{b} {why}"), ("Who asked?", a), ("When?", day)),
        )
    stage.say(b, "Yes, when?", "Sure, what time?", "Gladly. When?")
    time = _negotiate(stage, words.TIMES, "How about {option}?", a, b)
    stage.say(stage.choice((a, b)), "And where?", "Where do we meet?")
    place = _negotiate(stage, words.PLACES, "What about {option}?", *stage.different([a, b], 2))
    return (
        f"{a} and {b} will {activity} {day}. They will meet at {place} {time}.",
        f"{a} asked {b} to {activity}. {_capital(day)} {time} both came to {place}.",
        (("What time?", time), ("Which place?", place), ("Which day?", day), ("Who asked?", a)),
    )


def _borrowing(stage: _Stage) -> Outcome:
    a, b, item = stage.a, stage.b, stage.choice(words.ITEMS)
    stage.say(a, f"Can I borrow your {item}?", f"Could you lend me your {item}?", f"I need a {item}. Do you have one?")
    course = stage.rng.random()
    if course < 0.3:
        stage.say(b, f"{stage.other} has it.", f"I lent it to {stage.other}.", f"{stage.other} took it last week.")
        stage.say(a, f"Then I will ask {stage.other}.", f"OK, I'll call {stage.other}.")
        return (
            f"{a} wants to borrow a {item} from {b}, but {stage.other} has it. {a} will ask {stage.other}.",
            f"{b} could not help because the {item} was with {stage.other}. So {a} called {stage.other}.",
            (("Who has it?", stage.other), ("What was needed?", f"a {item}"), ("Who needs it?", a)),
        )
    if course < 0.5:
        stage.say(b, "Sorry, it is broken.", "No, it broke last week.", "It does not work any more.")
        _accept_pity(stage, a)
        return (
            f"{b} can't lend {a} the {item} because it is broken.",
            f"The {item} of {b} was broken and {a} went away without it.",
            (("What is broken?", f"the {item}"), ("Who needs it?", a), ("Who owns it?", b)),
        )
    stage.say(b, "Yes, when will you return it?", "Sure. Until when?", "OK, when do I get it back?")
    day = _negotiate(stage, words.DAYS, "I'll bring it back {option}.", a, b)
    return (
        f"{b} will lend {a} the {item}. {a} will return it {day}.",
        f"{a} took the {item} that belongs to {b} and brought it back {day}.",
        (("When does it come back?", day), ("What was needed?", f"a {item}"), ("Who owns it?", b)),
    )


def _birthday(stage: _Stage) -> Outcome:
    a, b, other = stage.a, stage.b, stage.other
    day = stage.choice(words.DAYS)
    stage.say(a, f"{other} has a birthday {day}.", f"Don't forget, the birthday of {other} is {day}.")
    stage.say(b, "Right! What do we give?", "Oh! Any ideas for a present?", "What shall we buy?")
    gift = _negotiate(stage, words.GIFTS, "How about {option}?", a, b)
    buyer = stage.choice((a, b))
    stage.say(buyer, f"I will buy {gift}.", "I can get it.", "Leave it to me, I'll buy it.")
    _agree(stage, b if buyer == a else a)
    return (
        f"{a} and {b} will give {other} {gift} {day}. {buyer} will buy it.",
        f"{_capital(day)} {other} had a birthday and got {gift}, which {buyer} had bought.",
        (("Whose birthday?", other), ("Which present?", gift), ("Who buys it?", buyer), ("Which day?", day)),
    )


def _travel(stage: _Stage) -> Outcome:
    a, b = stage.a, stage.b
    city, vehicle, day = stage.choice(words.CITIES), stage.choice(words.VEHICLES), stage.choice(words.DAYS)
    time, later = stage.different(words.TIMES, 2)
    stage.say(
        a,
        f"My {vehicle} gets to {city} {day} {time}. Can you pick me up?",
        f"I arrive in {city} {day} {time} by {vehicle}. Could you pick me up?",
    )
    if stage.chance(0.35):
        why = _refuse(stage, b)
        stage.say(a, "OK, I'll take a taxi.", "Then I'll take a taxi.")
        return (
            f"{a} arrives in {city} {day} {time} and will take a taxi because {b} {why}.",
            f"Nobody waited for {a} in {city}, since {b} {why}. A taxi helped.",
            (("Which city?", city), ("What time?", time), ("Who takes a taxi?", a), ("Why?", f"{b} {why}")),
        )
    stage.say(b, "Of course.", f"Sure, see you in {city}.", f"Yes, I will be in {city} then.")
    if stage.chance(0.4):
        stage.say(a, f"The {vehicle} is late. It comes {later}.", f"Bad news, I will only arrive {later}.")
        _agree(stage, b, later)
        time = later
    else:
        stage.say(a, "Thank you!", "Thanks, see you there.")
    return (
        f"{b} will pick {a} up in {city} {day} {time}.",
        f"{a} went by {vehicle} to {city}, and {time} {b} was waiting there {day}.",
        (("Which city?", city), ("What time?", time), ("Who arrives?", a), ("Who waits?", b), ("Which day?", day)),
    )


def _dinner(stage: _Stage) -> Outcome:
    a, b = stage.a, stage.b
    stage.say(a, "What shall we eat tonight?", "What do you want for dinner?", "I'm hungry. What do we cook?")
    food = _negotiate(stage, words.FOODS, "How about {option}?", b, a)
    thing = stage.choice(words.GROCERIES)
    stage.say(a, f"We have no {thing}.", f"The {thing} is gone.", f"But we need {thing}.")
    if stage.chance(0.5):
        stage.say(b, f"I'll buy {thing} on my way.", f"I will get {thing}.")
        buyer = b
    else:
        stage.say(b, f"Can you buy {thing}?", f"Could you get {thing}, please?")
        stage.say(a, "Yes, I'll go now.", "OK, I will.")
        buyer = a
    return (
        f"{a} and {b} will have {food} for dinner. {buyer} will buy {thing}.",
        f"{a} and {b} ate {food}. {buyer} had gone out for {thing}.",
        (("Which dish?", food), ("What is missing?", thing), ("Who goes to the shop?", buyer)),
    )


def _work(stage: _Stage) -> Outcome:
    a, b, document = stage.a, stage.b, stage.choice(words.DOCUMENTS)
    stage.say(a, f"Is the {document} ready?", f"Have you finished the {document}?", f"I need the {document}.")
    course = stage.rng.random()
    if course < 0.3:
        why = _refuse(stage, b)
        stage.say(a, f"Then {stage.other} must do it.", f"OK, I'll give it to {stage.other}.")
        return (
            f"{stage.other} will do the {document} because {b} {why}.",
            f"{a} gave the {document} to {stage.other}, since {b} {why}.",
            (("Which paper?", f"the {document}"), ("Who does it now?", stage.other), ("Why?", f"{b} {why}")),
        )
    stage.say(b, "Not yet. When do you need it?", "Almost. Until when do you need it?", "No. When must it be done?")
    time = _negotiate(stage, words.TIMES, "I need it {option}.", a, b)
    return (
        f"{b} will send {a} the {document} {time}.",
        f"{a} waited for the {document}. It came from {b} {time}.",
        (("Which paper?", f"the {document}"), ("What time?", time), ("Who sends it?", b), ("Who waits?", a)),
    )


def _lost(stage: _Stage) -> Outcome:
    a, b, thing = stage.a, stage.b, stage.choice(words.BELONGINGS)
    place, guess = stage.different(words.PLACES, 2)
    stage.say(a, f"I can't find my {thing}.", f"I lost my {thing}!", f"Have you seen my {thing}?")
    if stage.chance(0.5):
        stage.say(b, f"Did you look at {guess}?", f"Maybe at {guess}?")
        stage.say(a, "Not there.", "Yes, nothing.", "I did. Nothing.")
    if stage.chance(0.4):
        stage.say(b, f"Your {thing}? No idea.", f"I don't know where your {thing} is.")
        stage.say(a, f"I'll ask at {place}.", f"Then I will look at {place}.")
        return (
            f"{a} lost {_their(a)} {thing}. {_capital(_they(a))} will look for it at {place}.",
            f"{a} had no {thing} any more and went to {place} to search.",
            (("What is lost?", f"the {thing}"), ("Who lost it?", a), ("Where will the search be?", place)),
        )
    stage.say(b, f"You left your {thing} at {place}.", f"I saw your {thing} at {place}.", f"It lies at {place}.")
    day = _negotiate(stage, words.DAYS, "Can you bring it {option}?", a, b)
    return (
        f"{a} left {_their(a)} {thing} at {place}. {b} will bring it {day}.",
        f"The {thing} of {a} lay at {place} until {b} brought it back {day}.",
        (("What is lost?", f"the {thing}"), ("Where was it?", place), ("When does it come back?", day)),
    )


def _they(name: str) -> str:
    return "she" if name in words.HER_NAMES else "he"


def _pet(stage: _Stage) -> Outcome:
    a, b, other = stage.a, stage.b, stage.other
    pet, city, day = stage.choice(words.PETS), stage.choice(words.CITIES), stage.choice(words.DAYS)
    stage.say(
        a,
        f"I go to {city} {day}. Can you feed my {pet}?",
        f"Could you look after my {pet}? I leave for {city} {day}.",
    )
    if stage.chance(0.45):
        why = _refuse(stage, b)
        stage.say(b, f"Ask {other}.", f"Maybe {other} can do it.", f"{other} likes every {pet}.")
        stage.say(a, "Good idea, I'll ask.", "I will, thanks.")
        return (
            f"{b} can't feed the {pet} of {a} because {_they(b)} {why}. {a} will ask {other}.",
            f"{a} left for {city} {day}. The {pet} stayed with {other}, since {b} {why}.",
            (
                ("Which pet?", f"the {pet}"),
                ("Who will be asked?", other),
                ("Why?", f"{b} {why}"),
                ("Which city?", city),
            ),
        )
    stage.say(b, "Of course!", "With pleasure.", "Sure, give me the key.")
    stage.say(a, "Thank you!", "Thanks a lot.")
    return (
        f"{b} will feed the {pet} of {a}, who goes to {city} {day}.",
        f"While {a} was in {city}, {b} took care of the {pet}.",
        (
            ("Which pet?", f"the {pet}"),
            ("Who leaves?", a),
            ("Which city?", city),
            ("Who stays?", b),
            ("Which day?", day),
        ),
    )


def _chore(stage: _Stage) -> Outcome:
    a, b, other, chore = stage.a, stage.b, stage.other, stage.choice(words.CHORES)
    stage.say(a, f"Can you help me {chore}?", f"I have to {chore}. Will you help?", f"Help me {chore}, please!")
    if stage.chance(0.35):
        why = _refuse(stage, b)
        stage.say(a, f"Then I'll ask {other}.", f"OK, {other} will help me.")
        return (
            f"{b} can't help {a} {chore} because {_they(b)} {why}. {a} will ask {other}.",
            f"{a} had to {chore} with {other}, since {b} {why}.",
            (("Who helps?", other), ("Who was asked first?", b), ("Why?", f"{b} {why}")),
        )
    stage.say(b, "Yes. Which day?", "Sure, when?", "OK, but when?")
    day = _negotiate(stage, words.DAYS, "How about {option}?", a, b)
    return (
        f"{b} will help {a} {chore} {day}.",
        f"{_capital(day)} {b} came over to {chore} with {a}.",
        (("Who helps?", b), ("Which day?", day), ("What is to be done?", chore), ("Who asked?", a)),
    )


SCENES: tuple[Callable[[_Stage], Outcome], ...] = (
    *(_meeting, _borrowing, _birthday, _travel, _dinner, _work, _lost, _pet, _chore),
)


def _play(rng: random.Random) -> GeneratedDialogue:
    stage = _Stage(rng)
    if stage.chance(0.4):
        stage.chatter()
    summary, story, questions = stage.choice(SCENES)(stage)
    if stage.chance(0.2):
        stage.chatter()
    text = "\n".join(f"{speaker}: {line}" for speaker, line in stage.lines)
    return GeneratedDialogue(text, summary, story, questions)


def pretraining_texts(count: int, seed: int) -> Iterator[str]:
    """Documents for pretraining: a dialogue, then lines quoted from it, or questions with answers and often its story.

    Quoting teaches copying, questions and stories teach where to look. No document has a summary or its prompt: that is
    left for finetuning.
    """
    rng = random.Random(seed + 1)
    for dialogue in generate_dialogues(count, seed):
        course = rng.random()
        if course < 0.15:
            lines = dialogue.text.split("\n")
            quoted = [f"> {lines[i]}" for i in sorted(rng.sample(range(len(lines)), min(3, len(lines))))]
            yield dialogue.text + "\n\n" + "\n".join(quoted)
            continue
        asked = rng.sample(dialogue.questions, len(dialogue.questions))
        answered = "\n".join(f"{question} {answer}" for question, answer in asked)
        told = [answered, dialogue.story] if course < 0.7 else [dialogue.story] if course < 0.85 else [answered]
        yield "\n\n".join([dialogue.text, *told])
