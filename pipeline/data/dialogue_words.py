"""The words that the generated dialogues are made of.

Each list is short on purpose: a model of a million weights learns within minutes to copy what it has seen often, and a
guess is still wrong in most cases.
"""

from __future__ import annotations

HER_NAMES = ("Anna", "Clara", "Emma", "Julia", "Kate", "Mia", "Rosa", "Vera")
HIS_NAMES = ("Adam", "Ben", "Carl", "David", "Leo", "Nick", "Sam", "Tom")
DAYS = ("today", "tomorrow", "on Monday", "on Tuesday", "on Friday", "on Saturday", "on Sunday")
TIMES = ("at noon", "at one", "at two", "at three", "at five", "at six", "at seven", "at eight")
PLACES = (
    *("the park", "the library", "the station", "the museum", "the market", "the bakery", "the school"),
    *("the harbour", "the hotel"),
)
ACTIVITIES = (
    *("have coffee", "play chess", "go running", "go shopping", "have lunch", "play tennis"),
    *("watch a film", "go swimming"),
)
ITEMS = ("ladder", "tent", "bike", "camera", "guitar", "suitcase", "drill", "lamp")
BELONGINGS = ("wallet", "scarf", "phone", "ring", "notebook", "jacket", "hat", "passport")
GIFTS = (
    *("a watch", "a cookbook", "a teapot", "a plant", "a necklace", "a puzzle", "a painting", "a blanket"),
    "a football",
)
FOODS = ("pizza", "soup", "salad", "pasta", "curry", "fish", "tacos", "sushi")
GROCERIES = ("bread", "milk", "cheese", "rice", "butter", "wine", "sugar")
CITIES = ("Berlin", "Paris", "Rome", "London", "Madrid", "Oslo", "Vienna")
VEHICLES = ("train", "bus", "plane")
DOCUMENTS = ("report", "contract", "budget", "schedule", "invoice", "survey")
PETS = ("cat", "dog", "parrot", "rabbit", "hamster")
CHORES = ("fix the sink", "paint the fence", "move the sofa", "clean the garage", "plant the roses")

REASONS = (
    ("I have to work", "has to work"),
    ("I am ill", "is ill"),
    ("I have an exam", "has an exam"),
    ("my car broke down", "has a broken car"),
    ("I have to visit my aunt", "has to visit {their} aunt"),
    ("my parents are coming", "has guests"),
    ("I am too tired", "is too tired"),
    ("I am out of town", "is out of town"),
)
"""What a speaker says, and what a summary says of that speaker."""

SMALL_TALK = (
    ("How are you?", "Fine, thanks."),
    ("Hi! Long time no see.", "Yes, far too long!"),
    ("It is so cold outside.", "Terrible weather."),
    ("Did you watch the match?", "No, I fell asleep."),
    ("Have you heard the news?", "No, tell me later."),
    ("I saw {other} at {place} yesterday.", "Really? How is {other}?"),
    ("{other} says hello.", "Say hello back!"),
    ("{other} has a new job.", "Good for {other}."),
    ("{other} wanted to come {time}, but forgot.", "Typical."),
)
"""Chatter of two turns that no summary mentions; it may name people, places and times that do not matter."""
