"""A small bilingual world to learn from: people, places, animals, jobs, weather, words and numbers.

    python dataset/sample_world.py            # dataset/pretrain.txt, sft.jsonl, eval.jsonl

The world is a list of *facts*. A fact belongs to a *relation* ("person.city", "sum", ...), which has several
ways to state it and several ways to ask for it, in Chinese and in English. The facts make up three files:

- `pretrain.txt`: every fact, in every phrasing, in both languages: by itself, in biographies with sentences
  in varying order, on cards, in lists, and as the answer to a question asked in passing ("Where does Anna
  live? Anna lives in Paris."). A model can be asked for a fact later only if it has seen it in many
  phrasings, some questions among them (Allen-Zhu & Li, "Physics of Language Models: Part 3.1", 2023).
- `sft.jsonl`: questions and answers, single- and multi-turn, about three quarters of the facts.
- `eval.jsonl`: questions about the other facts. No fine-tuning conversation asks for these in any phrasing or
  language, and the questions are phrased as they never are in pretrain.txt. So fine-tuning teaches how to
  answer, but what to answer can only come from the statements in pretrain.txt.

Who lives where is drawn at random, so it can be known but not guessed. The same seed and size give the same
bytes on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.errors import UserError, run
from common.files import AtomicFiles

T = TypeVar("T")
Turns = list[tuple[str, str]]  # a conversation: (question, answer), ...

LANGUAGES = ("zh", "en")
PEOPLE = 24  # at size 1.0
HELD_OUT = 0.25  # share of each relation's facts that fine-tuning never asks for
BIOGRAPHIES, CARDS = 4, 2  # per person and language
NOTES = {"person": 1}  # how often each phrasing is written; for other topics, which have fewer subjects: 2
# How often pretrain.txt asks for a held-out fact in each phrasing, and how often for a taught fact besides
# the conversations. Topics with fewer subjects need more: for "Where does ... live?", 24 people are enough
# examples. For other topics, which follow a pattern: 6 and 0.
ASIDES = {"person": (1, 0), "weather": (10, 2)} | dict.fromkeys(("place", "job", "animal", "word"), (10, 1))
DIALOGUES = 10  # of each kind, per person and language
ARBITRARY = ("person", "place", "job", "animal", "word")  # topics with answers that cannot be derived
FEW = 4  # held-out questions of each other relation

# --- The things ------------------------------------------------------------------------------------
# Each table row is "Chinese English", or a subject followed by its values in the order of its relations.
# Within a topic, each thing that questions ask about begins with a different letter: a small character-level
# model confuses "dog" and "duck" long after it knows both.

WOMEN = ("安娜 Anna, 克莱尔 Claire, 爱玛 Emma, 格蕾丝 Grace, 艾薇 Ivy, 凯特 Kate, 玛丽 Mary, 奥尔加 Olga, "
         "罗莎 Rosa, 蒂娜 Tina, 温蒂 Wendy, 佐伊 Zoe")
MEN = ("鲍勃 Bob, 大卫 David, 弗兰克 Frank, 雨果 Hugo, 杰克 Jack, 里奥 Leo, 尼克 Nick, 彼得 Peter, 山姆 Sam, "
       "维克多 Victor, 泽维尔 Xavier, 尤里 Yuri")
SURNAMES = ("李 Lee, 杨 Young, 格林 Green, 布朗 Brown, 怀特 White, 布莱克 Black, 史密斯 Smith, 琼斯 Jones, "
            "泰勒 Taylor, 贝克 Baker, 库克 Cook, 希尔 Hill, 福斯特 Foster, 金 King, 斯通 Stone, 伍德 Wood, "
            "沃克 Walker, 亨特 Hunter, 费舍尔 Fisher, 卡特 Carter")

PETS = ("猫 cat, 狗 dog, 兔子 rabbit, 鹦鹉 parrot, 乌龟 turtle, 仓鼠 hamster, 蜥蜴 lizard, 山羊 goat, "
        "老鼠 mouse, 金鱼 fish, 蛇 snake, 小鸟 bird")
FOODS = ("面条 noodles, 米饭 rice, 饺子 dumplings, 汤 soup, 披萨 pizza, 面包 bread, 蛋糕 cake, 豆腐 tofu, "
         "鸡蛋 eggs, 甜瓜 melon, 苹果 apples, 葡萄 grapes")
COLOURS = "红色 red, 蓝色 blue, 绿色 green, 白色 white, 黄色 yellow, 紫色 purple, 橙色 orange, 银色 silver"
WEATHER = "晴天 sunny, 雨天 rainy, 雪天 snowy, 阴天 cloudy, 大风 windy, 大雾 foggy"
DAYS = "周一 Monday, 周二 Tuesday, 周三 Wednesday, 周四 Thursday, 周五 Friday, 周六 Saturday, 周日 Sunday"

# city: country, sight
PLACES = """
北京 Beijing: 中国 China, 长城 Great Wall
杭州 Hangzhou: 中国 China, 西湖 West Lake
巴黎 Paris: 法国 France, 铁塔 Eiffel Tower
伦敦 London: 英国 England, 大钟 big clock
罗马 Rome: 意大利 Italy, 斗兽场 Colosseum
开罗 Cairo: 埃及 Egypt, 金字塔 pyramids
维也纳 Vienna: 奥地利 Austria, 歌剧院 opera
莫斯科 Moscow: 俄罗斯 Russia, 红场 Red Square
东京 Tokyo: 日本 Japan, 樱花 cherry trees
首尔 Seoul: 韩国 Korea, 南大门 South Gate
雅典 Athens: 希腊 Greece, 神庙 temple
德里 Delhi: 印度 India, 红堡 Red Fort
"""
# job: workplace, tool
JOBS = """
医生 doctor: 医院 hospital, 针 needles
教师 teacher: 学校 school, 粉笔 chalk
厨师 cook: 厨房 kitchen, 锅 pans
农民 farmer: 田地 field, 锄头 spades
飞行员 pilot: 机场 airport, 飞机 planes
歌手 singer: 舞台 stage, 话筒 mics
护士 nurse: 诊所 clinic, 绷带 bandages
卫兵 guard: 城门 gate, 长矛 spears
面包师 baker: 店铺 shop, 烤箱 ovens
作家 writer: 书房 library, 墨水 ink
矿工 miner: 矿井 tunnel, 矿灯 lamps
木匠 joiner: 木屋 hut, 锯子 saws
"""
# animal: sound, food, legs
ANIMALS = """
猫 cat: 喵喵 meow, 鱼 fish, 4 4
狗 dog: 汪汪 woof, 骨头 bones, 4 4
牛 ox: 哞哞 moo, 青草 grass, 4 4
猪 pig: 哼哼 oink, 玉米 corn, 4 4
马 horse: 咴咴 neigh, 燕麦 oats, 4 4
鹅 goose: 嘎嘎 honk, 蜗牛 snails, 2 2
青蛙 frog: 呱呱 croak, 苍蝇 flies, 4 4
蜜蜂 bee: 嗡嗡 buzz, 花蜜 nectar, 6 6
狮子 lion: 吼吼 roar, 肉 meat, 4 4
老鼠 mouse: 吱吱 squeak, 奶酪 cheese, 4 4
狼 wolf: 嗷嗷 howl, 野鹿 deer, 4 4
蛇 snake: 嘶嘶 hiss, 鸟蛋 eggs, 0 0
"""
WORDS = ("apple banana cheese dinner eleven giggle hammer letter mirror needle pepper rabbit summer "
         "tomato").split()

# --- The phrasings ------------------------------------------------------------------------------------
# Per relation and language: the noun, statements, questions. {s} is the subject ("Anna", "she"), {p} its
# possessive ("Anna's", "her"), {v} the value; relations about two things have slots of their own.

class Phrases(NamedTuple):
    """One relation in one language: its name, statements and questions, separated by "|"."""

    noun: str
    statements: str
    questions: str


PHRASES = {
    "person.city": {
        "zh": Phrases("城市",
                      "{s}住在{v}。|{p}家在{v}。|{s}在{v}生活。|{p}城市是{v}。",
                      "{s}住在哪里？|{p}家在哪里？|{s}在哪里生活？|{p}城市是什么？"),
        "en": Phrases("city",
                      "{s} lives in {v}.|{p} home is in {v}.|{p} city is {v}.|{s} goes home to {v}.",
                      "Where does {s} live?|Where is {p} home?|What is {p} city?"
                      "|Which city does {s} live in?"),
    },
    "person.job": {
        "zh": Phrases("工作",
                      "{s}是{v}。|{p}工作是{v}。|{p}职业是{v}。|{s}的确是一名{v}。",
                      "{s}做什么工作？|{p}工作是什么？|{p}职业是什么？|{s}是做什么的？"),
        "en": Phrases("job",
                      "{s} is a {v}.|{s} works as a {v}.|{p} job is {v}.|{s} has been a {v} for years.",
                      "What is {p} job?|What does {s} work as?|What work does {s} do?|What does {s} do?"),
    },
    "person.pet": {
        "zh": Phrases("宠物",
                      "{s}养了一只{v}。|{p}宠物是{v}。|{s}有一只{v}。|{p}家里有一只{v}。",
                      "{s}养了什么宠物？|{p}宠物是什么？|{s}有什么宠物？|{s}养的是什么？"),
        "en": Phrases("pet",
                      "{s} has a {v}.|{p} pet is a {v}.|{s} keeps a {v}.|{s} walks with a {v}.",
                      "What is {p} pet?|What pet does {s} have?|Which pet does {s} keep?"
                      "|What animal does {s} have?"),
    },
    "person.food": {
        "zh": Phrases("最爱的食物",
                      "{s}最爱吃{v}。|{s}最爱的食物是{v}。|{s}喜欢吃{v}。|{p}午饭是{v}。",
                      "{s}最爱吃什么？|{s}最爱的食物是什么？|{s}喜欢吃什么？"),
        "en": Phrases("favourite food",
                      "{s} likes to eat {v}.|{p} favourite food is {v}.|{s} often eats {v}."
                      "|{p} lunch is {v}.",
                      "What is {p} favourite food?|What does {s} like to eat?"
                      "|What does {s} like to eat best?"),
    },
    "person.colour": {
        "zh": Phrases("最爱的颜色",
                      "{s}最爱的颜色是{v}。|{s}最爱{v}。|{s}喜欢{v}。|{p}衣服是{v}的。",
                      "{s}最爱什么颜色？|{s}最爱的颜色是什么？|{s}喜欢什么颜色？"),
        "en": Phrases("favourite colour",
                      "{s} likes the colour {v}.|{p} favourite colour is {v}.|{s} always wears {v}."
                      "|{p} coat is {v}.",
                      "What is {p} favourite colour?|Which colour does {s} like?"
                      "|What colour does {s} like best?"),
    },
    "person.friend": {
        "zh": Phrases("好朋友",
                      "{p}好朋友是{v}。|{s}常去看{v}。|{s}最好的朋友是{v}。|{s}有个好朋友叫{v}。",
                      "{p}好朋友是谁？|{s}最好的朋友是谁？|{p}好朋友叫什么？|{s}和谁是好朋友？"),
        "en": Phrases("best friend",
                      "{p} best friend is {v}.|{s} often visits {v}.|{s} is friends with {v}."
                      "|{s} likes to talk with {v}.",
                      "Who is {p} best friend?|Who is {p} friend?|Who is {s} friends with?"
                      "|What is {p} best friend called?"),
    },
    "place.country": {
        "zh": Phrases("国家",
                      "{s}在{v}。|{s}是{v}的城市。|{s}属于{v}。",
                      "{s}在哪个国家？|{s}属于哪个国家？|{s}是哪个国家的城市？"),
        "en": Phrases("country",
                      "{s} is in {v}.|{s} is a city in {v}.|The country of {s} is {v}.",
                      "Which country is {s} in?|To which country does {s} belong?"
                      "|In which country does {s} lie?"),
    },
    "place.sight": {
        "zh": Phrases("名胜",
                      "{s}有名的是{v}。|到{s}要看{v}。|{s}的名胜是{v}。",
                      "{s}有名的是什么？|到{s}要看什么？|{s}的名胜是什么？"),
        "en": Phrases("sight",
                      "{s} is famous for the {v}.|In {s} people visit the {v}."
                      "|The sight of {s} is the {v}.",
                      "What is {s} famous for?|What do people visit in {s}?|What can you see in {s}?"),
    },
    "job.place": {
        "zh": Phrases("地点",
                      "{s}在{v}工作。|{s}的工作地点是{v}。|{s}天天去{v}。",
                      "{s}在哪里工作？|{s}的工作地点是哪里？|{s}天天去哪里？"),
        "en": Phrases("workplace",
                      "{s} works at the {v}.|The workplace of {s} is the {v}."
                      "|{s} goes to the {v} every day.",
                      "Where does {s} work?|What place does {s} work at?|Where does {s} go every day?"),
    },
    "job.tool": {
        "zh": Phrases("工具",
                      "{s}用{v}。|{s}的工具是{v}。|{s}工作时用{v}。",
                      "{s}用什么？|{s}的工具是什么？|{s}工作时用什么？"),
        "en": Phrases("tool",
                      "{s} uses {v}.|The tools of {s} are {v}.|{s} works with {v}.",
                      "What does {s} use?|Which tools does {s} use?|What does {s} work with?"),
    },
    "animal.sound": {
        "zh": Phrases("叫声",
                      "{s}的叫声是{v}。|{s}{v}叫。|{s}叫起来是{v}。",
                      "{s}怎么叫？|{s}的叫声是什么？|{s}叫起来是什么声音？"),
        "en": Phrases("sound",
                      "{s} says {v}.|The sound of {s} is {v}.|{s} goes {v}.",
                      "What does {s} say?|How does {s} sound?|What sound does {s} make?"),
    },
    "animal.food": {
        "zh": Phrases("食物",
                      "{s}吃{v}。|{s}爱吃{v}。|{s}的食物是{v}。",
                      "{s}吃什么？|{s}爱吃什么？|{s}的食物是什么？"),
        "en": Phrases("food",
                      "{s} eats {v}.|{s} likes {v}.|The food of {s} is {v}.",
                      "What does {s} eat?|What food does {s} eat?|What does {s} live on?"),
    },
    "animal.legs": {
        "zh": Phrases("腿",
                      "{s}有{v}条腿。|{s}的腿有{v}条。|{s}一共{v}条腿。",
                      "{s}有几条腿？|{s}一共几条腿？"),
        "en": Phrases("legs",
                      "{s} has {v} legs.|The number of legs of {s} is {v}.|{s} goes on {v} legs.",
                      "How many legs does {s} have?|On how many legs does {s} go?"),
    },
    "word": {
        "zh": Phrases("英文",
                      "“{s}”的英文是{v}。|“{s}”用英文说是{v}。|{s}就是{v}。",
                      "“{s}”的英文是什么？|“{s}”用英文怎么说？|“{s}”英文叫什么？"),
        "en": Phrases("Chinese",
                      "{v} is \"{s}\" in Chinese.|The Chinese for \"{s}\" is {v}."
                      "|The word \"{s}\" means {v}.",
                      "What is \"{s}\" in Chinese?|How do you say \"{s}\" in Chinese?"
                      "|What is the Chinese for \"{s}\"?"),
    },
    "weather": {
        "zh": Phrases("天气",
                      "{s}{day}是{v}。|{s}{day}的天气是{v}。|{day}{s}是{v}。",
                      "{s}{day}天气怎么样？|{s}{day}的天气是什么？|{day}{s}天气怎么样？"),
        "en": Phrases("weather",
                      "On {day} {s} is {v}.|It is {v} in {s} on {day}.|On {day} it is {v} in {s}.",
                      "How is the weather in {s} on {day}?|What is {s} like on {day}?"
                      "|What weather does {s} have on {day}?"),
    },
    "sum": {
        "zh": Phrases("和",
                      "{a}+{b}={v}。|{a}加{b}等于{v}。|{a}加{b}是{v}。",
                      "{a}加{b}等于几？|{a}+{b}等于几？|{a}加{b}是多少？"),
        "en": Phrases("sum",
                      "{a}+{b}={v}.|{a} plus {b} is {v}.|{a} and {b} make {v}.",
                      "What is {a} plus {b}?|What is {a}+{b}?|How much is {a} and {b}?"),
    },
    "difference": {
        "zh": Phrases("差",
                      "{a}-{b}={v}。|{a}减{b}等于{v}。|{a}减{b}是{v}。",
                      "{a}减{b}等于几？|{a}-{b}等于几？|{a}减{b}是多少？"),
        "en": Phrases("difference",
                      "{a}-{b}={v}.|{a} minus {b} is {v}.|Take {b} from {a} and {v} is left.",
                      "What is {a} minus {b}?|What is {a}-{b}?|How much is {a} less {b}?"),
    },
    "bigger": {
        "zh": Phrases("大数",
                      "{a}和{b}，{v}更大。|比一比{a}和{b}，大的是{v}。|{a}和{b}里大的是{v}。",
                      "{a}和{b}哪个大？|{a}和{b}里大的是几？"),
        "en": Phrases("bigger number",
                      "Of {a} and {b}, {v} is bigger.|The bigger of {a} and {b} is {v}."
                      "|{a} or {b}: {v} is bigger.",
                      "Which is bigger, {a} or {b}?|What is the bigger of {a} and {b}?"),
    },
    "count": {
        "zh": Phrases("字母",
                      "{s}里有{v}个{letter}。|{s}这个词里有{v}个{letter}。|单词{s}中字母{letter}有{v}个。",
                      "{s}里有几个{letter}？|{s}这个词里有几个{letter}？|单词{s}中字母{letter}有几个？"),
        "en": Phrases("count",
                      "In {s} the letter {letter} appears {times}.|The word {s} has {v} {letter}."
                      "|The letter {letter} appears {times} in {s}.",
                      "How many {letter} are in {s}?|How often does {letter} appear in {s}?"
                      "|How many times is {letter} in {s}?"),
    },
    "length": {
        "zh": Phrases("长度",
                      "{s}有{v}个字母。|{s}这个词有{v}个字母。|单词{s}的长度是{v}。",
                      "{s}有几个字母？|单词{s}的长度是几？"),
        "en": Phrases("length",
                      "The word {s} has {v} letters.|The length of {s} is {v}."
                      "|To write {s} you need {v} letters.",
                      "How many letters are in {s}?|What is the length of {s}?"),
    },
}
# How a conversation goes on: "And his job?" (same subject), "What about Tom?" (same question).
SAME_SUBJECT = {"zh": "{noun}呢？", "en": "And {p} {noun}?"}
NEXT_SUBJECT = {"zh": ("{s}呢？", "那{s}呢？"), "en": ("And {s}?", "What about {s}?")}
SPACE, COLON, STOP = {"zh": "", "en": " "}, {"zh": "：", "en": ": "}, {"zh": "。", "en": "."}
PRONOUNS = {"zh": {"f": ("她", "她的"), "m": ("他", "他的")}, "en": {"f": ("she", "her"), "m": ("he", "his")}}


# --- Facts --------------------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class Fact:
    """One thing that is true in the world.

    `kind` is the relation. Facts with the same `key` (3+4 and 4+3) are either all in the fine-tuning data or
    all held out. `slots[language]` fills the relation's phrases; its "v" is the answer. `gender` ("f", "m")
    is set for people, who can be replaced by a pronoun.
    """

    kind: str
    key: str
    slots: dict[str, dict[str, str]]
    gender: str = ""

    @property
    def topic(self) -> str:
        return self.kind.split(".")[0]

    def value(self, language: str) -> str:
        """The essential part of the answer: "Paris"."""
        return self.slots[language]["v"]

    def answer(self, language: str) -> str:
        """The answer as a sentence: the first way to state the fact."""
        first, _, _ = PHRASES[self.kind][language].statements.partition("|")
        return self._fill([first], language, pronoun=False)[0]

    def statements(self, language: str, pronoun: bool = False) -> list[str]:
        """Every way to state the fact in `language`, with the subject's name or its pronoun."""
        return self._fill(PHRASES[self.kind][language].statements.split("|"), language, pronoun)

    def questions(self, language: str, pronoun: bool = False) -> list[str]:
        """Every way to ask for the fact in `language`."""
        return self._fill(PHRASES[self.kind][language].questions.split("|"), language, pronoun)

    def same_subject(self, language: str) -> str:
        """The short question that follows one about the same subject: "And his job?"."""
        return self._fill([SAME_SUBJECT[language]], language, pronoun=True)[0]

    def next_subject(self, language: str) -> list[str]:
        """The short questions that follow the same question about another subject: "What about Tom?"."""
        return self._fill(NEXT_SUBJECT[language], language, pronoun=False)

    def _fill(self, templates: Iterable[str], language: str, pronoun: bool) -> list[str]:
        slots = dict(self.slots[language], noun=PHRASES[self.kind][language].noun)
        if pronoun:
            slots["s"], slots["p"] = PRONOUNS[language][self.gender]
        sentences = [template.format(**slots) for template in templates]
        return [capitalise(sentence) for sentence in sentences] if language == "en" else sentences


class Draw:
    """Random choices based only on `random()`, which Python guarantees to be the same in all versions."""

    def __init__(self, seed: int):
        self._random = Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def choice(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def shuffled(self, items: Iterable[T]) -> list[T]:
        shuffled = list(items)
        for i in range(len(shuffled) - 1, 0, -1):
            j = self.below(i + 1)
            shuffled[i], shuffled[j] = shuffled[j], shuffled[i]
        return shuffled


@dataclass
class World:
    """All facts, and the keys of those that are held out for the evaluation.

    held_out: {key: which phrasing of the question only the evaluation uses, modulo how many there are}
    """

    facts: list[Fact]
    held_out: dict[str, int]

    def taught(self) -> list[Fact]:
        """The facts that the fine-tuning data asks for."""
        return [fact for fact in self.facts if fact.key not in self.held_out]

    def evaluated(self) -> list[Fact]:
        """The held-out facts."""
        return [fact for fact in self.facts if fact.key in self.held_out]

    def evaluation_question(self, fact: Fact, language: str) -> str:
        """The phrasing that the evaluation uses for a held-out fact, and pretrain.txt does not."""
        questions = fact.questions(language)
        return questions[self.held_out[fact.key] % len(questions)]


def build_world(seed: int = 1337, size: float = 1.0) -> World:
    """The world of a seed, with `PEOPLE * size` people. Raises UserError for a size or seed out of range."""
    if not 0.1 <= size <= 20:
        raise UserError(f"size must be between 0.1 and 20 (1.0 is {PEOPLE} people), found {size:g}")
    if seed < 0:
        raise UserError(f"seed must not be negative, found {seed}")
    draw = Draw(seed)
    facts = people_facts(draw, round(PEOPLE * size))
    facts += table_facts("place", PLACES) + table_facts("job", JOBS) + table_facts("animal", ANIMALS)
    facts += word_facts() + weather_facts(draw) + number_facts(draw) + letter_facts()
    held_out: dict[str, int] = {}
    for kind in PHRASES:
        keys = draw.shuffled(sorted({fact.key for fact in facts if fact.kind == kind}))
        held_out.update((key, draw.below(1000)) for key in keys[:round(HELD_OUT * len(keys))])
    return World(facts, held_out)


def people_facts(draw: Draw, n: int) -> list[Fact]:
    """Six facts per person. Values are dealt like cards, so that all are equally likely."""
    people = draw_people(draw, n)
    tables = {"city": PLACES, "job": JOBS, "pet": PETS, "food": FOODS, "colour": COLOURS}
    dealt = {attribute: deal(draw, pairs(table), n) for attribute, table in tables.items()}
    circle = draw.shuffled(range(n))  # each person's best friend is the next in the circle
    friend = {a: people[b] for a, b in zip(circle, circle[1:] + circle[:1], strict=True)}
    facts = []
    for i, (zh, en, gender) in enumerate(people):
        values = {attribute: dealt[attribute][i] for attribute in tables} | {"friend": friend[i][:2]}
        for attribute, (v_zh, v_en) in values.items():
            slots = {"zh": {"s": zh, "p": zh + "的", "v": v_zh}, "en": {"s": en, "p": en + "'s", "v": v_en}}
            facts.append(Fact(f"person.{attribute}", f"person.{attribute} {zh}", slots, gender))
    return facts


def draw_people(draw: Draw, n: int) -> list[tuple[str, str, str]]:
    """n distinct (Chinese name, English name, "f" or "m"), half women; with surnames if size is above 1.0."""
    given = {"f": draw.shuffled(pairs(WOMEN)), "m": draw.shuffled(pairs(MEN))}
    surnames = [("", ""), *(("·" + zh, " " + en) for zh, en in pairs(SURNAMES))]
    people = []
    for i in range(n):
        gender = "fm"[i % 2]
        surname, number = divmod(i // 2, len(given[gender]))
        zh, en = (first + last for first, last in zip(given[gender][number], surnames[surname], strict=True))
        people.append((zh, en, gender))
    return people


def deal(draw: Draw, values: list[T], n: int) -> list[T]:
    """n values in random order, each equally often (give or take one)."""
    return draw.shuffled((draw.shuffled(values) * (n // len(values) + 1))[:n])


def pairs(table: str) -> list[tuple[str, str]]:
    """(Chinese, English) pairs of a comma-separated list, or of the subjects of a table."""
    if "\n" in table:
        items = [row.split(":")[0] for row in table.strip().split("\n")]
    else:
        items = table.split(", ")
    return [(zh, en) for zh, en in (item.split(" ", 1) for item in items)]


def table_facts(topic: str, table: str) -> list[Fact]:
    """The facts of PLACES, JOBS or ANIMALS, one per value. English animals and jobs have an article."""
    kinds = [kind for kind in PHRASES if kind.startswith(topic + ".")]
    article = "" if topic == "place" else "the "
    facts = []
    for row in table.strip().split("\n"):
        subject, values = row.split(": ")
        zh, en = subject.split(" ", 1)
        for kind, value in zip(kinds, values.split(", "), strict=True):
            v_zh, v_en = value.split(" ", 1)
            slots = {"zh": {"s": zh, "v": v_zh}, "en": {"s": article + en, "v": v_en}}
            facts.append(Fact(kind, f"{kind} {en}", slots))
    return facts


def word_facts() -> list[Fact]:
    """The translations of words."""
    words: dict[str, str] = {}
    for zh, en in pairs(PETS) + pairs(FOODS) + pairs(COLOURS):
        if not any(en[0] == other[0] for other in words):
            words[en] = zh
    return [Fact("word", f"word {en}", {"zh": {"s": zh, "v": en}, "en": {"s": en, "v": zh}})
            for en, zh in sorted(words.items())]


def weather_facts(draw: Draw) -> list[Fact]:
    """The weather of a week in three cities."""
    facts = []
    for city_zh, city_en in pairs(PLACES)[:3]:
        for (day_zh, day_en), (v_zh, v_en) in zip(pairs(DAYS), deal(draw, pairs(WEATHER), 7), strict=True):
            slots = {"zh": {"s": city_zh, "day": day_zh, "v": v_zh},
                     "en": {"s": city_en, "day": day_en, "v": v_en}}
            facts.append(Fact("weather", f"weather {city_en} {day_en}", slots))
    return facts


def number_facts(draw: Draw) -> list[Fact]:
    """Sums and differences of numbers up to 5, and comparisons up to 9."""
    facts = []
    for a in range(6):
        for b in range(6):
            facts.append(numeric("sum", f"sum {min(a, b)} {max(a, b)}", a=a, b=b, v=a + b))
            if b <= a:
                facts.append(numeric("difference", f"difference {a} {b}", a=a, b=b, v=a - b))
    couples = [(a, b) for a in range(10) for b in range(a)]
    for a, b in sorted(draw.shuffled(couples)[:30]):
        for x, y in ((a, b), (b, a)):
            facts.append(numeric("bigger", f"bigger {b} {a}", a=x, b=y, v=a))
    return facts


def letter_facts() -> list[Fact]:
    """How long each word is, and how often its most frequent letter appears."""
    return [letter_fact(kind, word) for word in WORDS for kind in ("length", "count")]


def letter_fact(kind: str, word: str) -> Fact:
    if kind == "length":
        return numeric(kind, f"length {word}", s=word, v=len(word))
    letter = max(sorted(set(word)), key=word.count)
    n = word.count(letter)
    times = "1 time" if n == 1 else f"{n} times"
    return numeric(kind, f"count {word}", s=word, letter=letter, v=n, times=times)


def numeric(kind: str, key: str, **values: int | str) -> Fact:
    slots = {name: str(value) for name, value in values.items()}
    return Fact(kind, key, {"zh": slots, "en": slots})


def capitalise(sentence: str) -> str:
    """Make the first letter upper case (str.capitalize would also lower the rest)."""
    return sentence[:1].upper() + sentence[1:]


# --- Texts --------------------------------------------------------------------------------------------

def pretraining_documents(world: World, draw: Draw) -> list[str]:
    """The content of pretrain.txt: a shuffled list of documents, each a paragraph of a few sentences."""
    documents = []
    for language in LANGUAGES:
        documents += biographies(world, draw, language) + cards(world, draw, language)
        documents += lists(world, draw, language) + notes(world, draw, language)
        documents += asides(world, draw, language)
    return draw.shuffled(documents + bilingual_notes(world, draw))


def biographies(world: World, draw: Draw, language: str) -> list[str]:
    """Paragraphs with all facts about one person, place, job or animal, in varying order."""
    documents = []
    for facts in by_subject(world.facts, ("person", "place", "job", "animal")):
        for _ in range(BIOGRAPHIES):
            sentences = []
            for i, fact in enumerate(draw.shuffled(facts)):
                pronoun = fact.gender != "" and i > 0 and draw.below(3) > 0
                sentences.append(draw.choice(fact.statements(language, pronoun)))
            documents.append(SPACE[language].join(sentences))
    return documents


def cards(world: World, draw: Draw, language: str) -> list[str]:
    """Two facts about one person, one per line."""
    documents = []
    for facts in by_subject(world.facts, ("person",)) * CARDS:
        rows = [PHRASES[fact.kind][language].noun + COLON[language] + fact.value(language)
                for fact in draw.shuffled(facts)[:2]]
        documents.append("\n".join([facts[0].slots[language]["s"] + STOP[language], *rows]))
    return documents


def lists(world: World, draw: Draw, language: str) -> list[str]:
    """One attribute of several people, one per line."""
    documents = []
    for kind in PHRASES:
        facts = draw.shuffled(fact for fact in world.facts if fact.kind == kind and fact.topic == "person")
        for i in range(0, len(facts), 6):
            rows = [fact.slots[language]["s"] + COLON[language] + fact.value(language)
                    for fact in facts[i:i + 6]]
            documents.append("\n".join([PHRASES[kind][language].noun + STOP[language], *rows]))
    return documents


def notes(world: World, draw: Draw, language: str) -> list[str]:
    """Every fact in every phrasing, a few sentences on one topic per document."""
    topics: dict[str, list[str]] = {}
    for fact in world.facts:
        topics.setdefault(fact.topic, []).extend(fact.statements(language) * NOTES.get(fact.topic, 2))
    documents = []
    for statements in topics.values():
        sentences = draw.shuffled(statements)
        documents += [SPACE[language].join(sentences[i:i + 6]) for i in range(0, len(sentences), 6)]
    return documents


def asides(world: World, draw: Draw, language: str) -> list[str]:
    """Questions with their answers: "Where does Anna live? Anna lives in Paris."

    All facts in all phrasings except those of the evaluation; taught facts also as conversations.
    """
    found = [turns for its_language, turns in conversations(world, draw) if its_language == language]
    for fact in world.facts:
        times_held_out, times_taught = ASIDES.get(fact.topic, (6, 0))
        questions, times = fact.questions(language), times_taught
        if fact.key in world.held_out:
            questions.remove(world.evaluation_question(fact, language))
            times = times_held_out
        found += [[(question, fact.answer(language))] for question in questions] * times
    space = SPACE[language]
    lines = [space.join(question + space + answer for question, answer in turns)
             for turns in draw.shuffled(found)]
    return ["\n".join(lines[i:i + 3]) for i in range(0, len(lines), 3)]


def bilingual_notes(world: World, draw: Draw) -> list[str]:
    """A fact about a person in one language, then in the other."""
    documents = []
    for fact in world.facts:
        if fact.topic == "person":
            both = draw.shuffled(LANGUAGES)
            documents.append("\n".join(draw.choice(fact.statements(language)) for language in both))
    return documents


def by_subject(facts: Iterable[Fact], topics: Sequence[str]) -> list[list[Fact]]:
    """The facts of some topics, grouped by their subject: a person, place, ..."""
    groups: dict[tuple[str, str], list[Fact]] = {}
    for fact in facts:
        if fact.topic in topics:
            groups.setdefault((fact.topic, fact.slots["zh"]["s"]), []).append(fact)
    return list(groups.values())


def conversations(world: World, draw: Draw) -> list[tuple[str, Turns]]:
    """Conversations about the taught facts, most with one turn: a shuffled list of (language, turns)."""
    facts = world.taught()
    found = []
    for fact in facts:
        for language in LANGUAGES:
            for question in fact.questions(language):
                found.append((language, [(question, fact.answer(language))]))
    same_kind = {kind: [fact for fact in facts if fact.kind == kind] for kind in PHRASES}
    for known in by_subject(facts, ("person",)) * DIALOGUES:
        for language in LANGUAGES:
            if len(known) > 1:
                found.append((language, dialogue(draw, language, draw.shuffled(known)[:2])))
            first = draw.choice(known)
            other = draw.choice(same_kind[first.kind])
            if other is not first:
                found.append((language, dialogue(draw, language, [first, other])))
    return draw.shuffled(found)


def held_out_questions(world: World, draw: Draw) -> list[tuple[Fact, str, Turns]]:
    """The evaluation: (fact, language, turns); the last answer is the one that the model has to give.

    It asks for all held-out facts that are arbitrary, and for those about people also in conversations. Of
    the rest (numbers, letters, weather), where a pattern or a lucky guess may suffice, it asks for a few.
    """
    questions: list[tuple[Fact, str, Turns]] = []
    asked: dict[str, int] = {}
    for fact in draw.shuffled(world.evaluated()):
        asked[fact.kind] = asked.get(fact.kind, 0) + 1
        if fact.topic in ARBITRARY or asked[fact.kind] <= FEW:
            for language in LANGUAGES if fact.topic == "person" else [draw.choice(LANGUAGES)]:
                question = world.evaluation_question(fact, language)
                questions.append((fact, language, [(question, fact.answer(language))]))
    people = draw.shuffled(fact for fact in world.evaluated() if fact.topic == "person")
    taught = [fact for fact in world.taught() if fact.topic == "person"]
    for i, fact in enumerate(people[:(len(people) + 3) // 4]):
        subject = fact.slots["zh"]["s"]
        context = [other for other in taught
                   if (other.kind == fact.kind if i % 2 else other.slots["zh"]["s"] == subject)]
        if context:
            language = draw.choice(LANGUAGES)
            questions.append((fact, language, dialogue(draw, language, [draw.choice(context), fact])))
    return questions


def dialogue(draw: Draw, language: str, facts: Iterable[Fact]) -> Turns:
    """A conversation about some facts in order; later questions refer to the earlier ones."""
    turns: Turns = []
    previous = None
    for fact in facts:
        if previous is None:
            question = draw.choice(fact.questions(language))
        elif fact.kind == previous.kind:
            question = draw.choice(fact.next_subject(language))
        else:
            full = draw.choice(fact.questions(language, pronoun=True))
            question = draw.choice([fact.same_subject(language), full])
        turns.append((question, fact.answer(language)))
        previous = fact
    return turns


# --- Files --------------------------------------------------------------------------------------------

class Texts(NamedTuple):
    """A world and what is written about it: the documents, the conversations and the evaluation."""

    world: World
    documents: list[str]
    taught: list[tuple[str, Turns]]
    questions: list[tuple[Fact, str, Turns]]


def write_texts(seed: int = 1337, size: float = 1.0) -> Texts:
    """What `write_world` puts into the three files."""
    world = build_world(seed, size)
    draw = Draw(seed + 1)
    documents = pretraining_documents(world, draw)
    return Texts(world, documents, conversations(world, draw), held_out_questions(world, draw))


def write_world(out: str | Path, seed: int = 1337, size: float = 1.0) -> dict[str, int]:
    """Write `pretrain.txt`, `sft.jsonl` and `eval.jsonl` into the folder `out`; returns what they contain."""
    texts = write_texts(seed, size)
    world, documents, taught, questions = texts.world, texts.documents, texts.taught, texts.questions
    pretrain = "".join(f"<|bos|>{document}<|eos|>\n" for document in documents)
    sft = "".join(json_line(as_record(turns)) for _, turns in taught)
    evaluation = "".join(
        json_line(as_record(turns) | {"kind": fact.kind, "language": language, "fact": fact.key})
        for fact, language, turns in questions)

    with AtomicFiles() as files:
        for name, text in (("pretrain.txt", pretrain), ("sft.jsonl", sft), ("eval.jsonl", evaluation)):
            files.open(Path(out) / name).write(text.encode())
    return {
        "facts": len(world.facts),
        "documents": len(documents),
        "characters of running text": len(pretrain),
        "question-answer conversations": len(taught),
        "  of them multi-turn": sum(len(turns) > 1 for _, turns in taught),
        "held-out questions": len(questions),
        "distinct characters": len(set(pretrain + sft + evaluation)),
    }


def as_record(turns: Turns) -> dict[str, object]:
    """{"question", "answer"} for one turn, {"messages": [...]} for several."""
    if len(turns) == 1:
        return {"question": turns[0][0], "answer": turns[0][1]}
    return {"messages": [{"role": role, "content": text}
                         for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]}


def json_line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write a small bilingual world to learn from: pretrain.txt, sft.jsonl and eval.jsonl.",
        epilog="examples:\n  python dataset/sample_world.py\n"
               "  python dataset/sample_world.py --seed 7 --size 2 --out my_world",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1337, help="which world (default: 1337)")
    parser.add_argument("--size", type=float, default=1.0,
                        help=f"how many people: 1.0 is {PEOPLE} (default: 1.0)")
    parser.add_argument("--out", type=Path, default=ROOT / "dataset",
                        help="folder to write to (default: dataset/)")
    arguments = parser.parse_args()

    counts = write_world(arguments.out, arguments.seed, arguments.size)

    from rich.console import Console
    from rich.table import Table
    table = Table("sample world", f"seed {arguments.seed}, size {arguments.size:g}", title=str(arguments.out))
    table.columns[1].justify = "right"
    for what, count in counts.items():
        table.add_row(what, f"{count:,}")
    Console().print(table)


if __name__ == "__main__":
    run(main)
