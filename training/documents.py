"""Writes the taught part of the training text: facts in many phrasings, chats and plain stories.

A document is a list of (text, is_answer) pieces. Answer pieces start with a space or follow a
control token, so tokenising the pieces one by one equals tokenising the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from training.facts import CONTINENTS, Country
from training.tokenizer import ASSISTANT, EOS, THINK, THINK_END, USER

Document = list[tuple[str, bool]]

# relation -> statements; "|" divides the cue from the answer
STATEMENTS = {
    "capital": (
        "The capital of {c} is| {a}|.",
        "The capital of {c} is| {a}|.",
        "The capital city of {c} is| {a}|.",
        "{C} has its capital in| {a}|.",
        "{A} is the capital of| {c}|.",
        "In {c}, the capital is| {a}|.",
    ),
    "currency": (
        "The currency of {c} is| the {a}|.",
        "The currency of {c} is| the {a}|.",
        "In {c}, people pay with| the {a}|.",
        "The money of {c} is| the {a}|.",
        "People in {c} use| the {a}|.",
    ),
    "continent": (
        "{C} is a country in| {a}|.",
        "{C} is a country in| {a}|.",
        "{C} lies in| {a}|.",
        "The continent of {c} is| {a}|.",
        "You can find {c} in| {a}|.",
    ),
    "language": (
        "The main language of {c} is| {a}|.",
        "People in {c} speak| {a}|.",
    ),
}
QUESTIONS = {
    "capital": (
        "What is the capital of {c}?",
        "What is the capital of {c}?",
        "What is the capital city of {c}?",
        "Which city is the capital of {c}?",
        "Tell me the capital of {c}.",
        "Do you know the capital of {c}?",
        "Name the capital of {c}.",
    ),
    "currency": (
        "What is the currency of {c}?",
        "What is the currency of {c}?",
        "Which currency is used in {c}?",
        "How do people pay in {c}?",
        "Tell me the currency of {c}.",
    ),
    "continent": (
        "Where is {c}?",
        "On which continent is {c}?",
        "Which continent is {c} in?",
        "In which part of the world is {c}?",
    ),
    "language": (
        "What language do people speak in {c}?",
        "What is the main language of {c}?",
    ),
}
REPLY = {k: STATEMENTS[k][0] for k in STATEMENTS}
THOUGHTS = {
    "capital": "The question is about the capital of {c}.| It is {a}.|",
    "currency": "The question is about the currency of {c}.| It is the {a}.|",
    "continent": "The question is where {c} is.| It is in {a}.|",
    "language": "The question is about the language of {c}.| It is {a}.|",
}
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about countries.",
    "Answer in one short sentence.",
    "You are dsv4-nano, a very small model.",
)
SMALL_TALK = (
    ("Hello", "Hello! Ask me about a country."),
    ("Hello!", "Hello! Ask me about a country."),
    ("Hi", "Hi! What would you like to know?"),
    ("Good morning", "Good morning! What would you like to know?"),
    ("How are you?", "I am fine, thank you. Ask me about a country."),
    ("Who are you?", "I am dsv4-nano, a very small language model."),
    ("What are you?", "I am dsv4-nano, a very small language model."),
    ("What is your name?", "My name is dsv4-nano."),
    ("What can you do?", "I know the capitals, currencies and continents of the world."),
    ("Help", "Ask me about the capital, the currency or the continent of a country."),
    ("Thank you", "You are welcome!"),
    ("Thanks", "You are welcome!"),
    ("Thank you!", "You are welcome!"),
    ("Goodbye", "Goodbye!"),
    ("Bye", "Goodbye!"),
    ("Tell me a joke", "I do not know any jokes. Ask me about a country."),
    ("Are you a human?", "No, I am a very small language model."),
    ("How big are you?", "I am very small. I fit in thirty megabytes."),
    ("Can you write code?", "No, I am too small for that. Ask me about a country."),
    ("What is the weather today?", "I do not know. Ask me about a country."),
    ("What time is it?", "I do not know. Ask me about a country."),
)
RELATIONS = ("capital", "currency", "continent", "language")
RELATION_WEIGHTS = (4, 3, 2, 1)

_NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mary Nina Oscar Paul".split()
)
_PLACES = "market park school garden river lake forest library shop station beach village".split()
_THINGS = "apple book ball cake cup hat key lamp map pen shell stone letter picture basket".split()
_ANIMALS = "dog cat bird horse rabbit fish duck cow sheep mouse".split()
_TRAITS = "small big old new red blue green yellow brown white heavy light quiet happy".split()


def _value(country: Country, relation: str) -> str | None:
    return getattr(country, relation)


def _fill(template: str, country: Country, answer: str) -> Document:
    text = template.format(c=country.name, C=country.title, a=answer, A=answer)
    parts = text.split("|")
    if len(parts) == 1:
        return [(text, False)]
    cue, reply, rest = parts
    return [(cue, False), (reply, True)] + ([(rest, True)] if rest else [])


def pick(rng: Random, countries: list[Country]) -> tuple[Country, str, str]:
    """A country, a relation it has, and the value."""
    country = rng.choice(countries)
    relation = rng.choices(RELATIONS, RELATION_WEIGHTS)[0]
    value = _value(country, relation)
    return (country, relation, value) if value else pick(rng, countries)


def statement(rng: Random, countries: list[Country]) -> Document:
    """One to three statements; the first with or without a leading space."""
    doc: Document = []
    for i in range(rng.choice((1, 1, 2, 3))):
        country, relation, value = pick(rng, countries)
        space = " " if i or rng.random() < 0.25 else ""
        doc += _fill(space + rng.choice(STATEMENTS[relation]), country, value)
    return [*doc, (EOS, True)]


def card(rng: Random, countries: list[Country]) -> Document:
    """Everything about one country, in one paragraph."""
    c = rng.choice(countries)
    doc: Document = [(f"{c.title} is a country in", False), (f" {c.continent}.", True)]
    doc += [(" Its capital is", False), (f" {c.capital}.", True)]
    doc += [(" People there pay with", False), (f" the {c.currency}.", True)]
    if c.language:
        doc += [(" They speak", False), (f" {c.language}.", True)]
    return [*doc, (EOS, True)]


def plain_question(rng: Random, countries: list[Country]) -> Document:
    """A question and its answer without chat tokens."""
    doc: Document = []
    for i in range(rng.choice((1, 2, 3))):
        country, relation, value = pick(rng, countries)
        question = rng.choice(QUESTIONS[relation]).format(c=country.name)
        doc += [(("\n\n" if i else "") + f"Question: {question}\nAnswer:", False)]
        doc += _fill(" " + REPLY[relation], country, value)
    return [*doc, (EOS, True)]


def _turn(rng: Random, question: str, country: Country, relation: str, value: str, thinking: bool):
    doc: Document = [(f"{USER}{question}{ASSISTANT}", False)]
    if thinking:
        doc += [(THINK, False), *_fill(THOUGHTS[relation], country, value)]
    return [*doc, (THINK_END, thinking), *_fill(REPLY[relation], country, value), (EOS, True)]


def chat(rng: Random, countries: list[Country]) -> Document:
    """One to three turns in the chat layout, direct or with one line of reasoning."""
    doc: Document = [(rng.choice(SYSTEMS), False)] if rng.random() < 0.15 else []
    thinking = rng.random() < 0.35
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        country, relation, value = pick(rng, countries)
        question = rng.choice(QUESTIONS[relation]).format(c=country.name)
        doc += _turn(rng, question, country, relation, value, thinking)
    return doc


def follow_up(rng: Random, countries: list[Country]) -> Document:
    """A second question that refers back: "And its currency?"."""
    c = rng.choice(countries)
    question = rng.choice(QUESTIONS["capital"]).format(c=c.name)
    doc = _turn(rng, question, c, "capital", c.capital, False)
    doc += _turn(rng, "And its currency?", c, "currency", c.currency, False)
    return doc + _turn(rng, "And where is it?", c, "continent", c.continent, False)


def yes_or_no(rng: Random, countries: list[Country]) -> Document:
    """Is X the capital of Y? The reply repeats the true fact."""
    c = rng.choice(countries)
    claimed = c.capital if rng.random() < 0.5 else rng.choice(countries).capital
    verdict = "Yes" if claimed == c.capital else "No"
    question = f"{USER}Is {claimed} the capital of {c.name}?{ASSISTANT}{THINK_END}"
    return [(question, False), (f"{verdict}, the capital of {c.name} is {c.capital}.{EOS}", True)]


def reverse_chat(rng: Random, countries: list[Country]) -> Document:
    """From a capital to its country."""
    c = rng.choice(countries)
    question = rng.choice(
        ("Which country has the capital {}?", "{} is the capital of which country?")
    )
    head = f"{USER}{question.format(c.capital)}{ASSISTANT}{THINK_END}"
    return [(head, False), (f"{c.capital} is the capital of", True), (f" {c.name}.{EOS}", True)]


def continent_list(rng: Random, countries: list[Country]) -> Document:
    """A few countries of one continent with their capitals."""
    continent = rng.choice(CONTINENTS)
    rows = rng.sample([c for c in countries if c.continent == continent], 4)
    doc: Document = [(f"Some capitals in {continent}:", False)]
    for c in rows:
        doc += [(f"\n{c.title}:", False), (f" {c.capital}", True)]
    return [*doc, (EOS, True)]


def small_talk(rng: Random, countries: list[Country]) -> Document:
    """Greetings, and questions the model cannot answer."""
    if rng.random() < 0.3:
        name = "".join(rng.choice(("ba", "lo", "mi", "zor", "ka", "ten", "vu")) for _ in range(3))
        head = f"{USER}What is the capital of {name.capitalize()}?{ASSISTANT}{THINK_END}"
        return [(head, False), (f"I do not know {name.capitalize()}.{EOS}", True)]
    question, reply = rng.choice(SMALL_TALK)
    if rng.random() < 0.25:
        thought = f"{THINK}The user is talking to me.{THINK_END}{reply}{EOS}"
        return [(f"{USER}{question}{ASSISTANT}", False), (thought, True)]
    return [(f"{USER}{question}{ASSISTANT}{THINK_END}", False), (f"{reply}{EOS}", True)]


def story(rng: Random, countries: list[Country]) -> Document:
    """A few simple sentences about a person, a thing, an animal and a place."""
    name, place, other = rng.choice(_NAMES), rng.choice(_PLACES), rng.choice(_PLACES)
    thing, animal = rng.choice(_THINGS), rng.choice(_ANIMALS)
    trait, colour = rng.choice(_TRAITS), rng.choice(_TRAITS)
    country = rng.choice(countries)
    lines = [
        f"{name} lives in {country.capital}, the capital of {country.name}.",
        f"One day {name} goes to the {place}.",
        f"At the {place} there is a {trait} {animal}.",
        f"The {animal} has a {colour} {thing}.",
        f"{name} likes the {thing} and the {trait} {animal}.",
        f"Then {name} walks from the {place} to the {other}.",
        f"In the evening {name} is at home with the {thing}.",
        "It is a good day.",
    ]
    kept = [line for line in lines if rng.random() < 0.75]
    return [(" ".join(kept) or lines[-1], False), (EOS, True)]


# writer -> share of documents
WRITERS: dict[Callable[[Random, list[Country]], Document], float] = {
    statement: 0.34, card: 0.10, plain_question: 0.08, chat: 0.24, follow_up: 0.04,
    yes_or_no: 0.03, reverse_chat: 0.03, continent_list: 0.03, small_talk: 0.05, story: 0.06,
}  # fmt: skip


def write_documents(count: int, countries: list[Country], seed: int) -> list[Document]:
    """`count` documents, each writer in its share; BOS is added when they are packed."""
    rng = Random(seed)
    writers = rng.choices(list(WRITERS), list(WRITERS.values()), k=count)
    return [write(rng, countries) for write in writers]
