"""Word lists that the grammars draw from."""


def words(text):
    """The words of a text."""
    return text.split()


NAMES = words("""
Anna Ben Carla David Elena Felix Grace Hugo Iris Jonas Kira Leo Maya Nora Oscar Paula Quinn Rosa Simon Tara Uma
Victor Wendy Xavier Yara Zoe Adam Bella Carlos Diana Emil Fiona George Hana Ivan Julia Karl Lena Marco Nina
Oliver Petra Ravi Sara Tom Ursula Vera Walter Yusuf Zara Alice Bruno Clara Daniel Emma Frank Greta Henry Ida
James Kate Lucas Mia Noah Olga Peter Rita Sam Tina Vince Will Amir Bea Chen Dora Eli Faye Gus Holly Igor Jade
Kofi Lily Mona Ned Opal Piet Rex Sofia Theo Vik
""")

PEOPLE = words("""
baker farmer teacher doctor painter sailor pilot gardener singer writer miner builder tailor cook fisher captain
student clerk driver carpenter dancer judge nurse poet soldier weaver shepherd potter engineer librarian
""")

ANIMALS = words("""
cat dog fox rabbit owl bear horse mouse frog duck goose wolf deer lion tiger monkey panda otter badger hedgehog
squirrel turtle snake lizard parrot eagle sparrow crow swan goat sheep cow pig donkey camel whale dolphin seal
shark crab bee ant spider snail beetle moth bat rat hen
""")

OBJECTS = words("""
lamp book key map boat rope box coin bell clock mirror letter lantern basket bucket hammer needle button candle
ladder bottle spoon cup plate hat coat boot glove ring crown sword shield drum flute violin piano kite ball
wheel cart wagon bicycle engine radio camera compass telescope pencil brush paper stamp ticket chair table bed
door window gate fence blanket pillow carpet curtain bag chest barrel jar kettle pot pan knife fork bowl broom
shovel saw nail stone pearl diamond feather shell leaf flower seed apple pear plum cherry lemon melon carrot
onion potato bread cake cookie cheese butter honey sugar salt pepper soup tea juice milk
""")

PLACES = words("""
forest river mountain valley village city harbor island desert meadow garden castle tower bridge market school
library museum station theater bakery farm mill cave beach lake swamp hill field orchard palace temple square
street kitchen cellar attic workshop hospital prison lighthouse hotel restaurant park zoo ship tent cabin barn
""")

ADJECTIVES = words("""
small big old young happy sad brave quiet loud kind clever lazy tired hungry curious gentle proud shy strange
bright dark warm cold soft hard heavy light quick slow tall short round flat long wide narrow deep empty full
clean dirty new broken golden silver wooden iron rusty shiny dusty hidden secret lost famous simple fancy cheap
rich poor strong weak sharp sweet sour bitter fresh dry wet rough smooth calm wild busy lonely lucky funny
serious honest careful grumpy cheerful polite patient sleepy noisy silent gloomy foggy sunny windy snowy tiny
huge
""")

COLORS = words("""
red blue green yellow purple orange black white brown pink gray teal gold silver violet crimson indigo turquoise
maroon beige
""")

VERBS = [
    tuple(p.split("/"))
    for p in words("""
find/found carry/carried hide/hid lose/lost buy/bought sell/sold paint/painted repair/repaired break/broke
open/opened close/closed clean/cleaned drop/dropped throw/threw catch/caught borrow/borrowed return/returned
draw/drew build/built steal/stole share/shared keep/kept bring/brought move/moved lift/lifted wash/washed
watch/watched follow/followed visit/visited admire/admired remember/remembered forget/forgot polish/polished
examine/examined collect/collected count/counted measure/measured wrap/wrapped hold/held touch/touched
pull/pulled push/pushed shake/shook bury/buried describe/described choose/chose order/ordered need/needed
want/wanted like/liked
""")
]

ADVERBS = words("""
slowly quickly quietly carefully happily sadly proudly gently suddenly often never always sometimes yesterday
today early late again twice calmly boldly
""")

TIMES = [
    "in the morning",
    "at noon",
    "in the evening",
    "at night",
    "last week",
    "last summer",
    "every winter",
    "on Monday",
    "on Tuesday",
    "on Friday",
    "before dinner",
    "after lunch",
    "at dawn",
    "in spring",
    "after the storm",
    "long ago",
]

FOODS = words("""
pizza pasta rice soup salad curry sushi bread cheese apples pancakes noodles tacos dumplings cake waffles
mangoes grapes olives beans
""")

HOBBIES = words("""
reading painting running swimming cooking fishing singing dancing chess hiking sailing knitting gardening
cycling skating climbing drawing writing camping photography
""")

WEATHER = words("sunny cloudy rainy windy snowy foggy stormy clear hot cold")

FEELINGS = words("happy sad tired proud calm excited worried hopeful brave lonely grateful surprised")

NUMBER_WORDS = words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
""")

ALPHABET = "abcdefghijklmnopqrstuvwxyz"

UNICODE_WORDS = [
    "café",
    "naïve",
    "über",
    "señor",
    "Zürich",
    "żółw",
    "日本",
    "東京",
    "你好",
    "世界",
    "Привет",
    "мир",
    "καλημέρα",
    "🙂",
    "🚀",
    "🐢",
    "🌍",
    "❤️",
    "→",
    "½",
    "€",
    "°C",
    "“quoted”",
    "한국",
    "مرحبا",
    "été",
    "façade",
    "crème",
]

SIMPLE_WORDS = sorted(set(ANIMALS + OBJECTS + PLACES + COLORS + PEOPLE + ADJECTIVES))

SYLLABLES = [c + v for c in ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"] for v in "aeiou"]
