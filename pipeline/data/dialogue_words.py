"""The words that the generated dialogues are made of."""

from __future__ import annotations

HER_NAMES = (
    *("Anna", "Bella", "Clara", "Diana", "Emma", "Fiona", "Grace", "Hannah", "Iris", "Julia", "Kate", "Laura"),
    *("Mia", "Nora", "Olivia", "Paula", "Rosa", "Sara", "Tina", "Vera", "Wendy", "Zoe"),
)
HIS_NAMES = (
    *("Adam", "Ben", "Carl", "David", "Eric", "Frank", "George", "Henry", "Ivan", "Jack", "Kevin", "Leo"),
    *("Max", "Nick", "Oscar", "Paul", "Ryan", "Sam", "Tom", "Victor", "Walter", "Zack"),
)
DAYS = (
    *("today", "tomorrow", "on Monday", "on Tuesday", "on Wednesday", "on Thursday", "on Friday"),
    *("on Saturday", "on Sunday"),
)
TIMES = (
    *("at noon", "at one", "at two", "at three", "at four", "at five", "at six", "at seven", "at eight"),
    *("at half past two", "at half past four", "at half past six"),
)
PLACES = (
    *("the park", "the library", "the station", "the museum", "the gym", "the market", "the bakery", "the pool"),
    *("the bridge", "the school", "the harbour", "the church", "the office", "the hotel", "the garden"),
)
ACTIVITIES = (
    *("have coffee", "play chess", "go running", "study", "go shopping", "have lunch", "play tennis"),
    *("watch a film", "go swimming", "practise Spanish", "take photos", "feed the ducks"),
)
ITEMS = (
    *("ladder", "tent", "bike", "camera", "guitar", "suitcase", "drill", "blender", "umbrella", "dictionary"),
    *("lamp", "sleeping bag", "calculator", "sewing machine"),
)
BELONGINGS = ("wallet", "scarf", "phone", "ring", "notebook", "jacket", "hat", "passport", "bag", "key")
GIFTS = (
    *("a watch", "a cookbook", "a teapot", "a board game", "a plant", "a necklace", "a puzzle", "a backpack"),
    *("a concert ticket", "a painting", "a blanket", "a football"),
)
FOODS = (
    *("pizza", "soup", "salad", "pasta", "sushi", "curry", "pancakes", "tacos", "fish", "dumplings"),
    *("stew", "burgers"),
)
GROCERIES = ("bread", "milk", "eggs", "cheese", "rice", "apples", "butter", "lemons", "wine", "sugar")
CITIES = ("Berlin", "Paris", "Rome", "London", "Madrid", "Oslo", "Vienna", "Dublin", "Prague", "Lisbon")
VEHICLES = ("train", "bus", "plane")
DOCUMENTS = ("report", "contract", "budget", "schedule", "invoice", "presentation", "survey", "guest list")
PETS = ("cat", "dog", "parrot", "rabbit", "hamster", "goldfish")
CHORES = ("fix the sink", "paint the fence", "move the sofa", "clean the garage", "plant the roses", "repair the roof")

REASONS = (
    ("I have to work", "has to work"),
    ("I am ill", "is ill"),
    ("I have an exam", "has an exam"),
    ("my car broke down", "has a broken car"),
    ("I have to visit my aunt", "has to visit {their} aunt"),
    ("I am seeing the dentist", "is seeing the dentist"),
    ("my parents are coming", "has guests"),
    ("I am too tired", "is too tired"),
    ("I have no money left", "has no money left"),
    ("I am out of town", "is out of town"),
)
"""What a speaker says, and what a summary says of that speaker."""

SMALL_TALK = (
    ("How are you?", "Fine, thanks."),
    ("Hi! Long time no see.", "Yes, far too long!"),
    ("It is so cold outside.", "Terrible weather."),
    ("Did you watch the match?", "No, I fell asleep."),
    ("How was your trip?", "Wonderful, I took many photos."),
    ("Have you heard the news?", "No, tell me later."),
    ("Are you busy?", "Not really."),
    ("I slept so badly.", "Oh no, poor you."),
    ("I saw {other} at {place} yesterday.", "Really? How is {other}?"),
    ("{other} says hello.", "Say hello back!"),
    ("{other} has a new job.", "Good for {other}."),
    ("{other} wanted to come {time}, but forgot.", "Typical."),
)
"""Chatter of two turns that no summary mentions; it may name people, places and times that do not matter."""
